"""The commands, one a file."""

from .plan import plan
from .pretrain import pretrain
from .push import push
from .run import run
from .scan import scan
from .verify import verify

COMMANDS = (plan, run, verify, scan, push, pretrain)
