"""The models: bodies, heads with their loss, and how they are built, read, written and sharded."""

from megapd.models.build import STATISTICS as STATISTICS
from megapd.models.build import Body as Body
from megapd.models.build import Compared as Compared
from megapd.models.build import Learner as Learner
from megapd.models.build import LossHead as LossHead
from megapd.models.build import Parts as Parts
from megapd.models.build import build_model as build_model
from megapd.models.build import parameter_count as parameter_count
from megapd.models.from_checkpoint import HUGGING_FACE as HUGGING_FACE
from megapd.models.from_checkpoint import Shape as Shape
from megapd.models.from_checkpoint import build_teacher as build_teacher
from megapd.models.from_checkpoint import canary as canary
from megapd.models.from_checkpoint import check_architecture as check_architecture
from megapd.models.from_checkpoint import checkpoint_shape as checkpoint_shape
from megapd.models.from_checkpoint import load_teacher as load_teacher
from megapd.models.from_checkpoint import model_section as model_section
from megapd.models.from_checkpoint import read_parts as read_parts
from megapd.models.from_checkpoint import teacher_logit_form as teacher_logit_form
from megapd.models.hub import load_hugging_face as load_hugging_face
from megapd.models.hub import save_hugging_face as save_hugging_face
from megapd.models.initial import start_from as start_from
from megapd.models.mlp import MLP as MLP
from megapd.models.transformer import Transformer as Transformer
from megapd.models.weights import copy_weights as copy_weights
