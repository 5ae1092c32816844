"""The commands, one a file."""

from .clean import clean
from .export import export
from .plan import plan
from .pretrain import pretrain
from .push import push
from .recipes import recipes
from .run import run
from .scan import scan
from .seal import seal
from .verify import verify

COMMANDS = (plan, run, verify, seal, push, export, scan, pretrain, recipes, clean)
