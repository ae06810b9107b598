"""Distil in the repositories of RT-DETR (v1 and v2), D-FINE, DEIM and DEIMv2, from their own launch command.

Run in the root of the repository, instead of tools/train.py or train.py, with the same arguments:

    TEACHER_CONFIG=configs/dfine/dfine_hgnetv2_s_coco.yml TEACHER=dfine_s.pth \
        python /path/to/rt_detr.py -c configs/dfine/dfine_hgnetv2_n_coco.yml --use-amp

LEVELS="0,1;1,2" names the feature maps of student and teacher that correspond, where they have different ones.
"""

import copy
import importlib
import os
import runpy
import sys
from pathlib import Path

import torch

from detr_kd_losses.taps import DistillationCriterion

sys.path.insert(0, "")
package = "engine" if Path("engine").is_dir() else "src"  # DEIM's name for it
YAMLConfig = importlib.import_module(f"{package}.core").YAMLConfig
TASKS = importlib.import_module(f"{package}.solver").TASKS
load_config = importlib.import_module(f"{package}.core.yaml_utils").load_config


class DistillingSolver(TASKS["detection"]):
    """The repository's solver, whose criterion has a teacher."""

    def _setup(self) -> None:
        super()._setup()
        self._teach()

    def setup(self) -> None:  # as RT-DETR v1 calls it
        super().setup()
        self._teach()

    def _teach(self) -> None:
        own = copy.deepcopy(self.cfg.yaml_cfg)  # to which v1 would write what the teacher's configuration says
        load_config.__defaults__ = ({},)  # a second configuration would go on with the options of the first
        config = YAMLConfig(os.environ["TEACHER_CONFIG"])
        for backbone in {"PResNet", "HGNetv2"} & config.yaml_cfg.keys():
            config.yaml_cfg[backbone]["pretrained"] = False
        state = torch.load(os.environ["TEACHER"], map_location="cpu", weights_only=False)
        teacher = config.model
        self.cfg.yaml_cfg = own
        teacher.load_state_dict(state["ema"]["module"] if "ema" in state else state["model"])
        pairs = os.environ.get("LEVELS")
        levels = [[int(level) for level in side.split(",")] for side in pairs.split(";")] if pairs else None
        self.criterion = DistillationCriterion(self.criterion, self.model, teacher.to(self.device), levels=levels)
        self.criterion.learn(self.cfg.optimizer)


TASKS["detection"] = DistillingSolver
runpy.run_path("tools/train.py" if Path("tools/train.py").exists() else "train.py", run_name="__main__")
