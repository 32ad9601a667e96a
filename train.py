"""`deepspeed train.py --config RECIPE.yaml --deepspeed_config ds_configs/X.json job=NAME`"""

from pipeline.errors import run_main
from pipeline.train import main

if __name__ == "__main__":
    run_main(main)
