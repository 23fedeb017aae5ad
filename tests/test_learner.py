from pm_hf.learner import learn


def test_stream_is_learned(stream_config):
    report = learn(stream_config)
    assert report.metrics["task_incremental"]["ACC"] > 0.8
