"""The quickstart as a script: the code of nbs/tutorials/01_quickstart.ipynb, and the same weights to the last bit.

python examples/quickstart.py --epochs 2 --run runs/script
"""

import argparse
import hashlib
