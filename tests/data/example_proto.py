"""tf.train.Example for Google's own protobuf parser, described here so that no test needs TensorFlow for it."""

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

_PACKAGE = "example_of_the_tests"


def _message(file, name: str, *fields: tuple) -> descriptor_pb2.DescriptorProto:
    message = file.message_type.add(name=name)
    for number, label, kind, type_name in fields:
        field = message.field.add(name=label, number=number, type=kind, label=1)
        if type_name:
            field.type_name = f".{_PACKAGE}.{type_name}"
    return message


def _build():
    kind = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name=f"{_PACKAGE}.proto", package=_PACKAGE, syntax="proto3")
    for name, value in (
        ("BytesList", kind.TYPE_BYTES),
        ("FloatList", kind.TYPE_FLOAT),
        ("Int64List", kind.TYPE_INT64),
    ):
        _message(file, name, (1, "value", value, "")).field[0].label = 3
    lists = [(n, f.lower(), kind.TYPE_MESSAGE, f) for n, f in ((1, "BytesList"), (2, "FloatList"), (3, "Int64List"))]
    feature = _message(file, "Feature", *lists)
    feature.oneof_decl.add(name="kind")
    for field in feature.field:
        field.oneof_index = 0
    features = _message(file, "Features", (1, "feature", kind.TYPE_MESSAGE, "Features.FeatureEntry"))
    features.field[0].label = 3
    entry = features.nested_type.add(name="FeatureEntry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, type=kind.TYPE_STRING, label=1)
    entry.field.add(name="value", number=2, type=kind.TYPE_MESSAGE, label=1, type_name=f".{_PACKAGE}.Feature")
    _message(file, "Example", (1, "features", kind.TYPE_MESSAGE, "Features"))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.Example"))


Example = _build()


def read(payload: bytes) -> dict[str, list]:
    """Feature name -> its values; DecodeError where the parser refuses."""
    out = {}
    for name, feature in Example.FromString(payload).features.feature.items():
        kind = feature.WhichOneof("kind")
        out[name] = list(getattr(feature, kind).value) if kind else []
    return out
