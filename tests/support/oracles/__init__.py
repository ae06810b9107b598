"""NumPy float64 oracles of every loss: the equations in plain loops, with exact gradients.

They import nothing from the package under test. Functions have the names, arguments and defaults of the
package's; `value_and_grad` differentiates them with respect to student arrays. Only the overlaps differ:
`box_iou` and `generalized_box_iou` take two single cxcywh boxes, and `pairwise` makes the matrix.
"""

from .autodiff import *  # noqa: F403
from .box_distributions import *  # noqa: F403
from .features import *  # noqa: F403
from .geometry import *  # noqa: F403
from .losses import *  # noqa: F403
from .masks import *  # noqa: F403
from .plain_features import *  # noqa: F403
from .weights import *  # noqa: F403
