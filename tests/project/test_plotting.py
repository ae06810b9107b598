"""The pictures: what is on the Axes, not how it looks."""

from __future__ import annotations

import io
import itertools
import subprocess
import sys

import pytest
import torch
from torch.testing import assert_close

import detr_kd_losses as dkl

pytest.importorskip("matplotlib", reason="needs matplotlib")

from matplotlib import figure as figures

from detr_kd_losses import plotting
from detr_kd_losses.plotting import images

IMAGE = torch.rand(3, 12, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def ax():
    return figures.Figure().subplots()


def predictions(queries, *, layers=2, images=2, channels=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(layers, images, queries, channels, generator=generator)
    boxes = 0.1 + 0.5 * torch.rand(layers, images, queries, 4, generator=generator)
    return dkl.Predictions(logits, boxes)


def named(ax, prefix):
    return [line for line in ax.lines if line.get_label().startswith(prefix)]


class TestMatching:
    student, teacher = predictions(7), predictions(9, seed=1)
    assignment = dkl.match_teacher(*student, *teacher)

    def test_a_link_joins_the_centres_of_a_pair(self, ax):
        assert plotting.plot_matching(IMAGE, self.student, self.teacher, self.assignment, index=1, ax=ax) is ax
        links = named(ax, "link")
        assert len(links) == 7
        for line in links:
            n, m = (int(word) for word in line.get_label().removeprefix("link ").split(" - "))
            assert self.assignment[-1, 1, n] == m
            (x, other_x), (y, other_y) = line.get_data()
            assert_close(torch.tensor([x, y]), self.student.boxes[-1, 1, n, :2], check_dtype=False)
            # The teacher's view of the image stands a gap to the right.
            expected = self.teacher.boxes[-1, 1, m, :2] + torch.tensor([1 + images._GAP, 0.0])
            assert_close(torch.tensor([other_x, other_y]), expected, check_dtype=False)
        assert [image.get_extent()[0] for image in ax.images] == [0, 1 + images._GAP]

    def test_links_are_those_of_the_surest_teacher_queries(self, ax):
        plotting.plot_matching(IMAGE, self.student, self.teacher, self.assignment, max_links=3, ax=ax)
        drawn = {int(line.get_label().split(" - ")[1]) for line in named(ax, "link")}
        matched = self.assignment[-1, 0]
        scores = self.teacher.logits[-1, 0, matched].sigmoid().amax(-1)
        assert drawn == set(matched[scores.topk(3).indices].tolist())
        dots = named(ax, "pairs")
        assert [len(line.get_xdata()) for line in dots] == [7, 7]

    def test_margins_name_query_class_and_score(self, ax):
        names = ["cat", "dog", "cow"]
        plotting.plot_matching(
            IMAGE, self.student, self.teacher, self.assignment, stage=0, max_links=2, class_names=names, ax=ax
        )
        texts = [text.get_text() for text in ax.texts if "query" in text.get_text()]
        assert len(texts) == 4
        for line in named(ax, "link"):
            n, m = (int(word) for word in line.get_label().removeprefix("link ").split(" - "))
            for side, query in ((self.student, n), (self.teacher, m)):
                score, label = side.logits[0, 0, query].sigmoid().max(-1)
                assert any(f"query {query}: {names[label]}, {score:.2f}" in text for text in texts)

    def test_a_pair_is_on_one_line_of_both_margins_at_300_queries(self, ax):
        student, teacher = predictions(300), predictions(300, seed=1)
        plotting.plot_matching(IMAGE, student, teacher, dkl.match_teacher(*student, *teacher), max_links=17, ax=ax)
        left, right = (
            {
                text.get_text().split()[1].strip(":"): text.get_position()[1]
                for text in listed
                if "query" in text.get_text()
            }
            for listed in ([t for t in ax.texts if (t.get_position()[0] < 0) == edge] for edge in (True, False))
        )
        heights = sorted(left.values())
        assert len(heights) == 17
        assert min(b - a for a, b in itertools.pairwise(heights)) > 0.058  # of 17 lines
        assert 0 < heights[0] < heights[-1] < 1
        for line in named(ax, "link"):
            n, m = line.get_label().removeprefix("link ").split(" - ")
            assert left[n] == right[m]

    def test_both_boxes_of_a_pair_have_its_number(self, ax):
        plotting.plot_matching(IMAGE, self.student, self.teacher, self.assignment, max_links=3, ax=ax)
        badges = [(text.get_text(), *text.get_position()) for text in ax.texts if text.get_text().isdigit()]
        assert sorted(number for number, *_ in badges) == sorted([*"123"] * 4)  # in two margins, on two boxes
        right = 1 + images._GAP
        for line, number in zip(named(ax, "link"), "123", strict=True):
            n, m = (int(word) for word in line.get_label().removeprefix("link ").split(" - "))
            for side, query, left in ((self.student, n, 0.0), (self.teacher, m, right)):
                here = [(x - left, y) for known, x, y in badges if known == number and left <= x <= left + 1]
                corners = dkl.box_cxcywh_to_xyxy(side.boxes[-1, 0, query]).clamp(images._BADGE, 1 - images._BADGE)
                (x, y), (x1, y1, x2, y2) = here[0], corners.tolist()
                assert len(here) == 1
                assert min(abs(x - x1), abs(x - x2)) + min(abs(y - y1), abs(y - y2)) < 1e-6

    def test_numbers_of_equal_boxes_do_not_hide_each_other(self, ax):
        boxes = torch.full((1, 1, 4, 4), 0.5)
        same = dkl.Predictions(torch.randn(1, 1, 4, 3), boxes)
        plotting.plot_matching(IMAGE, same, same, torch.arange(4).expand(1, 1, 4), ax=ax)
        places = {text.get_position() for text in ax.texts if text.get_text().isdigit()}
        assert len(places) == 16

    def test_a_box_ends_with_the_image(self, ax):
        wide = dkl.Predictions(torch.randn(1, 1, 1, 3), torch.tensor([[[[0.1, 0.9, 0.6, 0.6]]]]))
        plotting.plot_matching(IMAGE, wide, wide, torch.zeros(1, 1, 1, dtype=torch.int64), ax=ax)
        assert ax.patches[0].get_bbox().extents == pytest.approx((0.0, 0.6, 0.4, 1.0))

    def test_positives_alone(self, ax):
        positive = torch.zeros(2, 2, 9, dtype=torch.bool)
        positive[-1, 0, self.assignment[-1, 0, 4]] = True
        plotting.plot_matching(IMAGE, self.student, self.teacher, self.assignment, teacher_positive=positive, ax=ax)
        assert [line.get_label() for line in named(ax, "link")] == [f"link 4 - {self.assignment[-1, 0, 4]}"]

    def test_a_softmax_head_has_no_class_of_nothing(self, ax):
        nothing = self.student._replace(logits=self.student.logits + torch.tensor([0.0, 0.0, 50.0]))
        options = {"student_activation": "softmax", "teacher_activation": "softmax"}
        plotting.plot_matching(IMAGE, nothing, self.teacher, self.assignment, ax=ax, **options)
        assert not any("class 2" in text.get_text() for text in ax.texts)

    def test_nothing_is_matched(self, ax):
        plotting.plot_matching(IMAGE, self.student, self.teacher, torch.full_like(self.assignment, -1), ax=ax)
        assert not named(ax, "link")

    def test_other_depths(self, ax):
        """The teacher layer is the one that taught this student layer."""
        deep = predictions(9, layers=6, seed=1)
        selected = [dkl.select_stages(tensor, 2) for tensor in deep]
        assignment = dkl.match_teacher(*self.student, *selected)
        plotting.plot_matching(IMAGE, self.student, deep, assignment, stage=0, max_links=1, ax=ax)
        m = int(named(ax, "link")[0].get_label().split(" - ")[1])
        expected = selected[1][0, 0, m, 0] + 1 + images._GAP
        assert named(ax, "link")[0].get_xdata()[1] == pytest.approx(expected.item())

    @pytest.mark.parametrize(
        ("change", "error", "match"),
        [
            ({"image": torch.rand(12, 16)}, ValueError, r"`image` must have shape \(3, H, W\), got \(12, 16\)"),
            ({"image": torch.ones(3, 2, 2).long()}, TypeError, "`image` must have a floating-point dtype"),
            ({"assignment": assignment.int()}, TypeError, "`assignment` must have dtype torch.int64"),
            ({"assignment": assignment[..., 1:]}, ValueError, "`assignment` and `student.logits` must have the same"),
            ({"teacher_positive": assignment}, TypeError, "`teacher_positive` must have dtype torch.bool"),
            (
                {"assignment": assignment.where(assignment != 3, 9)},
                ValueError,
                r"`assignment` must be in \[-1, 9\), got 9",
            ),
            (
                {"teacher_positive": torch.ones(2, 2, 8).bool()},
                ValueError,
                "`teacher_positive` and `teacher_logits`",
            ),
            (
                {"class_names": ["cat", "dog"]},
                ValueError,
                "`class_names` must have a name for each of 3",
            ),
            ({"max_links": 1.5}, TypeError, "`max_links` must be a whole number, got 1.5"),
            ({"index": 2}, ValueError, r"`index` must be in 0, \.\.\., 1, got 2"),
            ({"stage": 2}, ValueError, r"`stage` must be in -2, \.\.\., 1, got 2"),
        ],
    )
    def test_errors(self, change, error, match, ax):
        arguments = {
            "image": IMAGE,
            "student": self.student,
            "teacher": self.teacher,
            "assignment": self.assignment,
            "ax": ax,
        }
        with pytest.raises(error, match=match):
            plotting.plot_matching(**{**arguments, **change})


def test_mask(ax):
    mask = torch.rand(3, 4)
    image = (255 * IMAGE).to(torch.uint8)
    assert plotting.plot_mask(image, mask, boxes=torch.tensor([[0.5, 0.5, 0.2, 0.4]]), ax=ax) is ax
    shown, weights = ax.images
    assert shown.get_array().shape == (12, 16, 3)
    assert_close(torch.tensor(weights.get_array()), mask)
    assert weights.get_extent() == [0, 1, 1, 0]
    (box,) = ax.patches
    assert box.get_bbox().bounds == pytest.approx((0.4, 0.3, 0.2, 0.4))
    with pytest.raises(ValueError, match=r"`mask` must have shape \(H, W\), got \(1, 3, 4\)"):
        plotting.plot_mask(image, mask[None], ax=ax)


def test_terms(ax):
    terms = {"loss_kd_class": torch.tensor([2.0, 1.0], requires_grad=True), "loss_kd_bbox": [1.0, 0.5]}
    assert plotting.plot_terms(terms, steps=[10, 20], ax=ax) is ax
    drawn = {line.get_label(): line.get_xydata().tolist() for line in ax.lines}
    assert drawn == {"loss_kd_class": [[10, 2], [20, 1]], "loss_kd_bbox": [[10, 1], [20, 0.5]]}
    assert ax.get_yscale() == "log"
    with pytest.raises(ValueError, match=r"`terms\['loss_kd_giou'\]` and `steps` must have the same"):
        plotting.plot_terms({"loss_kd_giou": [1.0]}, steps=[10, 20], ax=ax)


def test_terms_of_which_one_is_0(ax):
    assert plotting.plot_terms({"loss_kd_class": [0.0, 1.0]}, ax=ax).get_yscale() == "linear"


def test_instability(ax):
    share = torch.rand(5, 3)
    share[0] = torch.nan
    assert plotting.plot_instability(share, ax=ax) is ax
    assert [line.get_label() for line in ax.lines] == ["layer 1", "layer 2", "layer 3"]
    for line, expected in zip(ax.lines, share.double().unbind(1), strict=True):
        assert_close(torch.tensor(line.get_ydata()), expected, equal_nan=True, check_dtype=False)
    with pytest.raises(ValueError, match="`instability` and `steps` must have the same"):
        plotting.plot_instability(share, steps=[1, 2], ax=ax)
    assert len(plotting.plot_instability(share[:, 0], ax=figures.Figure().subplots()).lines) == 1


def test_magnitudes(ax):
    magnitudes = {name: dkl.LossMagnitude(*torch.rand(4)) for name in ("loss_kd_class", "loss_kd_feature")}
    assert plotting.plot_magnitudes(magnitudes, ax=ax) is ax
    expected = [magnitude.relative_gradient_norm.item() for magnitude in magnitudes.values()]
    assert [bar.get_width() for bar in ax.patches] == pytest.approx(expected)
    assert [label.get_text() for label in ax.get_yticklabels()] == list(magnitudes)
    (dots,) = (line for line in ax.lines if line.get_label() == "value")
    assert dots.get_xdata() == pytest.approx([magnitude.relative_value.item() for magnitude in magnitudes.values()])


def test_magnitudes_beside_a_task_without_a_gradient(ax):
    numbers = torch.tensor([[1.0, 2.0, torch.inf, torch.inf], [0.0, 0.0, torch.nan, torch.nan], [0.0, 0.0, 0.0, 0.0]])
    magnitudes = {name: dkl.LossMagnitude(*row) for name, row in zip("abc", numbers, strict=True)}
    plotting.plot_magnitudes(magnitudes, ax=ax)
    ax.figure.savefig(io.BytesIO())
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a: inf", "b: nan", "c"]


def test_curves_differ_by_more_than_their_colour(ax):
    plotting.plot_terms({str(number): [1.0, 2.0] for number in range(12)}, ax=ax)
    dashes = [str(line._dash_pattern) for line in ax.lines]
    assert len({(line.get_color(), dash) for line, dash in zip(ax.lines, dashes, strict=True)}) == 12
    assert all(one != other for one, other in itertools.pairwise(dashes))


def test_a_figure_of_its_own(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "Agg")
    pyplot = pytest.importorskip("matplotlib.pyplot", reason="needs matplotlib")
    with pyplot.rc_context({"backend": "Agg"}):
        ax = plotting.plot_mask(IMAGE, torch.rand(2, 2))
        assert ax.figure.number in pyplot.get_fignums()
        pyplot.close(ax.figure)


def test_without_matplotlib_the_extra_is_named():
    program = "import sys; sys.modules['matplotlib'] = None; import detr_kd_losses.plotting"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "detr_kd_losses.plotting needs matplotlib: pip install 'detr-kd-losses[plot]'" in run.stderr
