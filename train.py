"""Train from a small config, under the name that the nanoGPT2 guide uses: train.py --config configs/nano.yaml."""

from run_train import train_from

if __name__ == "__main__":
    train_from("--config", description=__doc__)
