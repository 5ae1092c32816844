"""The commands, one a file."""

from .clean import clean
from .plan import plan
from .pretrain import pretrain
from .recipes import recipes
from .run import run
from .scan import scan
from .seal import seal
from .verify import verify

COMMANDS = (plan, run, verify, seal, scan, pretrain, recipes, clean)
