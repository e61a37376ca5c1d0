"""LinearAttentionConfig: strict, and stable through JSON."""

import json

import pytest

from hf_linattn import LinearAttentionConfig


def test_round_trip_through_json():
    config = LinearAttentionConfig(
        feature_map="taylor",
        feature_map_kwargs={"projection_dim": 8},
        window=0,
        softmax_layers=[3, 1, 3],
        decay="fixed",
        normalize=False,
        a=0.5,
        dropout=0.1,
        dropout_form="printed",
    )
    assert config.softmax_layers == (1, 3)
    assert LinearAttentionConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_layer_windows_outlive_the_string_keys_of_json():
    config = LinearAttentionConfig(window=8, layer_windows={3: 64, 1: 16})
    assert LinearAttentionConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert [config.window_of(layer) for layer in range(4)] == [8, 16, 8, 64]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"layer_windows": [3]}, "layer_windows: expected a dict"),
        ({"layer_windows": {"x": 3}}, "layer_windows: expected layer indices >= 0 and windows >= 1, got 'x': 3"),
        ({"layer_windows": {1: 0}}, "layer_windows: expected layer indices >= 0 and windows >= 1, got 1: 0"),
        ({"layer_windows": {1: 4}, "window": 0}, "layer_windows: expected {} together with window=0"),
        ({"feature_map": "hedgehop"}, "feature_map: expected one of hedgehog"),
        ({"sinks": -1}, "sinks: expected an integer >= 0"),
        ({"far_length": 0}, "far_length: expected a number of tokens >= 1"),
        ({"window": -1}, "window: expected an integer >= 0"),
        ({"window": 6.5}, "window: expected an integer >= 0"),
        ({"window": True}, "window: expected an integer >= 0"),
        ({"normalize": False}, "normalize: a softmax window"),
        ({"softmax_layers": "all"}, "softmax_layers: expected a list"),
        ({"softmax_layers": [0, -1]}, "softmax_layers: expected layer indices"),
        ({"decay": "vector"}, "decay: expected one of None, fixed, scalar"),
        ({"dropout": 1.0}, r"dropout: expected a number in \[0, 1\)"),
        ({"dropout_form": "inverted"}, "dropout_form: expected one of"),
        ({"a": "1"}, "a: expected a number"),
        ({"feature_map_kwargs": 3}, "feature_map_kwargs: expected a dict"),
        ({"decay": "fixed", "decay_kwargs": 3}, "decay_kwargs: expected a dict"),
        ({"decay_kwargs": {"learned": False}}, "decay_kwargs: expected a decay beside them"),
    ],
)
def test_errors_name_argument_and_expectation(values, message):
    with pytest.raises(ValueError, match=message):
        LinearAttentionConfig(**values)


def test_unknown_key_names_the_nearest():
    with pytest.raises(ValueError, match="unknown key 'softmax_layer'; did you mean 'softmax_layers'"):
        LinearAttentionConfig.from_dict({"softmax_layer": []})
    with pytest.raises(ValueError, match="unknown key 'zzz'; known keys: feature_map"):
        LinearAttentionConfig.from_dict({"zzz": 1})
