"""`deepspeed train.py --config RECIPE.yaml --deepspeed_config ds_configs/X.json job=NAME`"""

from pipeline.cli import train

if __name__ == "__main__":
    train()
