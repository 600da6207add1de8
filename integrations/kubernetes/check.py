#!/usr/bin/env python3
"""Checks the manifests beside this file, without a cluster.

    integrations/kubernetes/check.py PROGRAM

Those of Kubernetes itself against its schemas (the package kubernetes-validate, which is put into
target/kubernetes and brings them), ports and paths against each other, and the options of the
program against what PROGRAM says it has. The Gateway's own kinds have no schema there; of those it
checks what they point to.
"""

import pathlib
import subprocess
import sys
import venv

HERE = pathlib.Path(__file__).resolve().parent
ENV = HERE.parents[1] / "target" / "kubernetes"
VERSION = "1.33"


def fail(message):
    sys.exit(f"{HERE.name}: {message}")


def install():
    """This program again, with the package."""
    python = ENV / "bin" / "python"
    if not (ENV / "installed").exists():
        venv.create(ENV, with_pip=True, clear=True)
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "kubernetes-validate==1.37.0"], check=True)
        (ENV / "installed").touch()
    sys.exit(subprocess.run([python, __file__, *sys.argv[1:]]).returncode)


def documents(name):
    import yaml

    return [document for document in yaml.safe_load_all((HERE / name).read_text()) if document]


def one(found, kind):
    matching = [document for document in found if document["kind"] == kind]
    if len(matching) != 1:
        fail(f"{len(matching)} documents of kind {kind}, expected one")
    return matching[0]


def check_program(program, container):
    """Options that the program has, and probes at ports that exist."""
    help_text = subprocess.run([program, "serve", "--help"], capture_output=True, text=True)
    known = {word.rstrip(",") for word in help_text.stdout.split() if word.startswith("--")}
    image = (HERE / "Containerfile").read_text()
    options = [word.split("=")[0] for word in container["args"] if word.startswith("--")]
    options += [word.strip('",[]') for word in image.split() if word.startswith('"--')]
    for option in options:
        if option not in known:
            fail(f"serve has no option {option}; it has {', '.join(sorted(known))}")
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    texts = [f"--port={ports['http']}", f"--metrics-address=0.0.0.0:{ports['metrics']}"]
    for text in texts:
        if text not in container["args"]:
            fail(f"the container's ports are {ports}, but its arguments lack {text}")
    if f"EXPOSE {ports['http']} {ports['metrics']}" not in image:
        fail(f"the image does not expose {ports}")
    for probe, path in [("startup", "/ready"), ("readiness", "/ready"), ("liveness", "/live")]:
        found = container[f"{probe}Probe"]["httpGet"]
        if found != {"path": path, "port": "http"}:
            fail(f"the {probe} probe asks {found}, expected {path} at port http")
    return ports


def check_times(deployment, container):
    """The cluster waits for longer than the program drains."""
    pod = deployment["spec"]["template"]["spec"]
    drain = next(int(arg.split("=")[1]) for arg in container["args"] if "--drain-timeout" in arg)
    needed = container["lifecycle"]["preStop"]["sleep"]["seconds"] + drain
    if pod["terminationGracePeriodSeconds"] <= needed:
        fail(f"{pod['terminationGracePeriodSeconds']} s until the end, but {needed} s to drain")


def main():
    try:
        import kubernetes_validate
    except ModuleNotFoundError:
        install()
    if len(sys.argv) != 2:
        fail("usage: check.py PROGRAM")
    own = documents("bespoke.yaml")
    for document in own:
        kubernetes_validate.validate(document, VERSION, strict=True)
    deployment, service = one(own, "Deployment"), one(own, "Service")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    ports = check_program(sys.argv[1], container)
    check_times(deployment, container)
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    if service["spec"]["selector"] != labels:
        fail(f"the Service selects {service['spec']['selector']}, pods have {labels}")
    gateway = documents("inference-pool.yaml")
    pool, route = one(gateway, "InferencePool"), one(gateway, "HTTPRoute")
    if pool["spec"]["selector"]["matchLabels"] != labels:
        fail(f"the pool selects {pool['spec']['selector']}, pods have {labels}")
    if pool["spec"]["targetPorts"] != [{"number": ports["http"]}]:
        fail(f"the pool's ports are {pool['spec']['targetPorts']}, the container's {ports}")
    (backend,) = route["spec"]["rules"][0]["backendRefs"]
    group = pool["apiVersion"].split("/")[0]
    name = pool["metadata"]["name"]
    if backend != {"group": group, "kind": "InferencePool", "name": name}:
        fail(f"the route leads to {backend}, the pool is {group} {name}")
    print(f"{len(own)} manifests are valid in Kubernetes {VERSION}; {len(gateway)} point to them")


main()
