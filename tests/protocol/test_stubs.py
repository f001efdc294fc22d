import subprocess
import sys
from pathlib import Path

import pytest

PROTOCOL = Path(__file__).parents[2] / "protocol"


@pytest.mark.parametrize("module", ["fleet", "externalscaler"])
def test_the_committed_stubs_are_those_of_the_proto_file(module, tmp_path):
    source = f"kvrelay_protocol/{module}.proto"
    outputs = [f"--{kind}={tmp_path}" for kind in ("python_out", "pyi_out", "grpc_python_out")]
    subprocess.run(
        [
            sys.executable,
            "-m",
            "grpc_tools.protoc",
            f"-I{PROTOCOL}",
            *outputs,
            str(PROTOCOL / source),
        ],
        check=True,
    )
    for name in (f"{module}_pb2.py", f"{module}_pb2.pyi", f"{module}_pb2_grpc.py"):
        made = (tmp_path / "kvrelay_protocol" / name).read_text().splitlines()
        committed = (PROTOCOL / "kvrelay_protocol" / name).read_text().splitlines()
        # Another generator version is not another protocol.
        version = ("Protobuf Python Version", "GRPC_GENERATED_VERSION =")
        assert [x for x in made if not any(v in x for v in version)] == [
            x for x in committed if not any(v in x for v in version)
        ], f"{name}: run `make proto`"
