"""What becomes of the executors when the configuration is read again."""

from __future__ import annotations

from home_folder import Home

from pipeline.app import App
from pipeline.executors.base import FixedExecutors


class Cluster(FixedExecutors):
    closed = 0

    def close(self) -> None:
        self.closed += 1


def test_a_cluster_is_left_when_the_configuration_names_processes(home: Home, isolated: None) -> None:
    app = App.open(home.folder, home.folder / "settings.yaml")
    cluster = Cluster([])
    executors = app._processes(app.engine_choices, cluster)
    assert executors is not cluster
    assert cluster.closed == 1


def test_processes_go_on_with_another_configuration(home: Home, isolated: None) -> None:
    app = App.open(home.folder, home.folder / "settings.yaml")
    before = app._processes(app.engine_choices, None)
    assert isinstance(before, FixedExecutors)
    after = app._processes(app.engine_choices, before)
    assert isinstance(after, FixedExecutors)
    assert [id(one) for one in after.all()] == [id(one) for one in before.all()]
