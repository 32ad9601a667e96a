"""The cluster that the tests of the job scripts run on: is it one?"""


def test_jobs_run_on_every_node(cluster):
    done = cluster.run("srun", f"-N{cluster.nodes}", "hostname")
    assert sorted(done.stdout.split()) == [f"node{number}" for number in range(1, cluster.nodes + 1)]


def test_nodes_see_each_other_by_name_and_have_disks_of_their_own(cluster):
    local, small = cluster.folder / "local" / "x", cluster.folder / "small" / "x"
    cluster.run("srun", "-w", "node1", "sh", "-c", f"echo 2 > {local}; echo 1 > {small}")
    done = cluster.run("srun", "-w", "node2", "sh", "-c", f"cat {local} || cat {small}; getent hosts node1")
    assert done.stdout.split()[:2] == ["1", "10.77.0.11"] and "No such file" in done.stderr
