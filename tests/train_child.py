"""The train command, with a record of what its loader read: train_child.py RECORD [flags of qdepth_jax.train].

RECORD gets a JSON line for each batch that reached the step: global positions, their data set and frame.
"""

import json

from qdepth_jax import command, train
from qdepth_jax.data import loader


def main(argv: list[str]) -> int:
    record = argv.pop(1)
    read = loader.Loader.iterate

    def iterate(self, step=0, prefetch=2):
        with open(record, "a") as file:
            for number, batch in enumerate(read(self, step, prefetch), step + 1):
                # What the loader itself says of each row; the batch may lack some of it.
                which, _, index = self._planned(number - 1)
                frames = [int(self.sources[w].frames.valid[i]) for w, i in zip(which, index)]
                rows = list(zip(batch["position"].tolist(), which.tolist(), frames))
                file.write(json.dumps({"step": number, "rows": rows}) + "\n")
                file.flush()
                yield batch

    loader.Loader.iterate = iterate
    return train.main(argv)


if __name__ == "__main__":
    command.run(main)
