from parts.training import engine as core
from recipes.orchestrator.deepspeed_engine import DeepSpeedEngine, engine_of
ENGINES = {**core.ENGINES, "deepspeed": DeepSpeedEngine}
