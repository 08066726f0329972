"""Write a checkpoint of new weights: python -m patch_mlp_tower DIR."""

import sys

from patch_mlp_tower import write

if __name__ == "__main__":
    write(sys.argv[1])
