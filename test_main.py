"""Tests of main.py: a minute on a CPU, without GPU, dataset or network. Run: python -m pytest"""
import copy
import hashlib
import io
import pickle
import re
import subprocess
import sys
import tarfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

import main

pytestmark = pytest.mark.filterwarnings("ignore:ShiftScaleRotate")  # pytest drops main's own filter
DRY = ["--dry-run", "--batch-size", "16", "--workers", "0", "--device", "cpu"]
ROWS = [(kind, *numbers) for kind, *numbers in zip(  # the 41 rows of the summary
    "Conv2d BatchNorm2d ReLU Dropout Conv2d BatchNorm2d ReLU Dropout Conv2d BatchNorm2d ReLU Dropout "
    "Conv2d BatchNorm2d ReLU Dropout Conv2d Conv2d DepthwiseSeparable BatchNorm2d ReLU Dropout Conv2d "
    "Conv2d DepthwiseSeparable BatchNorm2d ReLU Dropout Conv2d BatchNorm2d ReLU Dropout Conv2d Conv2d "
    "BatchNorm2d ReLU Dropout Conv2d ReLU Conv2d AvgPool2d".split(),
    12 * [32] + 11 * [64] + 5 * [128] + 11 * [32] + 2 * [10],
    8 * [32] + 8 * [16] + 16 * [8] + [6] + 7 * [4] + [1],
    [864, 64, 0, 0, 9216, 64, 0, 0, 9216, 64, 0, 0, 18432, 128, 0, 0, 576, 4160, 0, 128, 0, 0, 576,
     8320, 0, 256, 0, 0, 4096, 64, 0, 0, 9216, 9216, 64, 0, 0, 9216, 0, 2880, 0])]
ROWS[12:16] = [(kind, 64, size, params) for kind, _, size, params in ROWS[12:16]]


def random_images(count):
    return torch.tensor(np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8))


def test_network_has_the_layers_of_the_assignment(capsys):
    net = main.Net()
    assert net(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert sum(p.numel() for p in net.parameters()) == 86_816
    assert main.describe(net) == 83
    out = capsys.readouterr().out
    rows = re.findall(r"(\w+)-(\d+) +\[-1, (\d+), (\d+), \4\] +([\d,]+)", out)
    assert [int(row[1]) for row in rows] == list(range(1, 42))
    assert [(row[0], int(row[2]), int(row[3]), int(row[4].replace(",", ""))) for row in rows] == ROWS
    flops, macs, dmas = map(float, re.search(r"([\d.]+) MFLOPs, ([\d.]+) MMACs, ([\d.]+) MD", out).groups())
    assert (flops, macs) == pytest.approx((39.34, 19.72), rel=0.03) and dmas == 20.03
    net.convblock1.requires_grad_(False)  # 10,208 parameters
    main.describe(net)
    assert "Total params: 86,816\nTrainable params: 76,608\n" in capsys.readouterr().out


def test_goals_are_measured(capsys):
    def unmet(net, field, augment, device, accuracy):
        main.print_goals(net, field, augment, device, accuracy)
        return re.findall("^(.+?) +required .* NOT met$", capsys.readouterr().out, re.M)
    net, augment = main.Net(), main.AUGMENT
    assert unmet(main.Net(dilated=True), 53, augment, "cuda", 87.0) == []
    assert unmet(net, 53, augment, "cuda", 87.0) == ["no stride: dilated kernels instead (bonus)"]
    pooled = main.Net(dilated=True)
    pooled.gap = torch.nn.AvgPool2d(16)  # its stride is 16
    assert unmet(pooled, 53, augment, "cuda", 87.0) == ["no stride: dilated kernels instead (bonus)"]
    net.gap = torch.nn.Sequential(torch.nn.MaxPool2d(4), torch.nn.Linear(1, 20_000))
    net.transblock2[0][0].groups, net.transblock3[0].dilation, net.transblock3[1].dilation = 1, (1, 1), (1, 1)
    assert len(unmet(net, 52, augment[:3], "cpu", 86.9)) == 11  # none is met


def test_dilated_network_is_the_same_computed_densely(capsys):
    torch.manual_seed(0)
    strided, dilated = main.Net(), main.Net(dilated=True).double()
    images = torch.randn(16, 3, 32, 32).double()
    strided.double()(images)  # so that the running means are not all 0
    dilated.load_state_dict(strided.state_dict())
    shapes = [[(name, p.shape) for name, p in net.named_parameters()] for net in (strided, dilated)]
    assert shapes[0] == shapes[1]
    assert all(np.max(getattr(layer, "stride", 1)) == 1 for layer in dilated.modules())
    assert main.describe(main.Net(dilated=True)) > 52
    few, many = (torch.nn.Sequential(*list(net.eval().children())[:-1])(images) for net in (strided, dilated))
    assert few.shape == (16, 10, 4, 4) and many.shape == (16, 10, 16, 16) and few.std() > 1e-4
    assert torch.allclose(few, many[:, :, ::4, ::4], rtol=0, atol=1e-12)
    assert torch.allclose(dilated(images), many.mean((2, 3)), rtol=0, atol=1e-12)


def test_receptive_field_is_what_gradients_reach(capsys):
    net = main.Net().eval()
    for parameter in net.parameters():
        torch.nn.init.constant_(parameter, 0.1)  # positive: no contribution cancels another
    main.describe(net)
    table = re.findall(r"^\w+ +\w+ +\[\d+, \d+, \d+\] +[\d,]+ +(\d+)$", capsys.readouterr().out, re.M)
    printed = [int(field) for field in table]
    image = torch.ones(1, 3, 256, 256, dtype=torch.double, requires_grad=True)
    reached, x = [], image
    for block in net.double().children():
        x = block(x)
        gradient, = torch.autograd.grad(x[0, 0, x.shape[2] // 2, x.shape[3] // 2], image, retain_graph=True)
        rows = gradient[0].abs().sum((0, 2)).nonzero()
        reached.append(int(rows.max() - rows.min()) + 1)
    assert printed == reached == [5, 7, 11, 15, 23, 55, 71, 83]


def test_hole_is_16x16_of_the_mean_colour():
    dropout = copy.deepcopy(next(t for t in main.AUGMENT if type(t).__name__ == "CoarseDropout"))
    dropout.p = 1
    for image in np.full((100, 32, 32, 3), 255, np.uint8):
        hole = np.argwhere((dropout(image=image)["image"] == (125, 123, 114)).all(axis=2))
        assert len(hole) == 256 and (np.ptp(hole, axis=0) == 15).all()


def test_flip_and_grey_are_independent(monkeypatch):
    image = torch.zeros(1, 32, 32, 3, dtype=torch.uint8)
    image[:, :, :16, 0] = 200  # its left half is red
    for transform, p in zip(main.AUGMENT, (0.3, 0, 0, 0.5)):
        monkeypatch.setattr(transform, "p", p)
    batch = main.AugmentedBatches(image, torch.zeros(1))[np.zeros(4000, int), 0][0]
    batch = batch * torch.tensor(main.STD)[:, None, None] + torch.tensor(main.MEAN)[:, None, None]
    flipped = batch[:, 0, 0, 0] < batch[:, 0, 0, 31]
    grey = (batch[:, 0] - batch[:, 1]).abs().amax((1, 2)) < 0.01
    for flip, p_flip in ((flipped, 0.3), (~flipped, 0.7)):
        for tint in (grey, ~grey):
            assert (flip & tint).double().mean().item() == pytest.approx(0.5 * p_flip, abs=0.03)


def test_batches_depend_on_seed_and_step_alone():
    def batches(images, batch_size, seed, epochs):
        dataset = main.AugmentedBatches(images, torch.arange(len(images)))
        return [dataset[key] for key in main.shuffled_batches(len(images), batch_size, seed, epochs)]
    images, labels = zip(*batches(random_images(50), 16, 0, range(2)))
    assert [len(batch) for batch in labels] == 2 * [16, 16, 16, 2]
    epochs = torch.cat(labels).split(50)
    assert all(sorted(epoch.tolist()) == list(range(50)) for epoch in epochs)
    assert not torch.equal(*epochs)
    assert torch.equal(images[6], batches(random_images(50), 16, 0, range(1, 2))[2][0])  # an epoch by itself
    twice = batches(random_images(1)[[0, 0]], 1, 0, range(20))
    assert len({image.numpy().tobytes() for image, _ in twice}) > 20  # in an epoch and between
    other = batches(random_images(50), 16, 1, range(1))[0]
    assert not torch.equal(images[0], other[0]) and not torch.equal(labels[0], other[1])


@pytest.mark.parametrize("precision", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("device", ("cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU"))))
def test_training_lowers_the_loss(device, precision):
    torch.manual_seed(0)
    net = main.Net().to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, fused=True)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1)
    scaler = torch.amp.GradScaler(device, enabled=precision == torch.float16)
    batch = main.AugmentedBatches(random_images(16), torch.arange(16) % 10)[np.arange(16), 0]
    losses = [main.train(iter([batch]), 1, precision, net, optimizer, scheduler, scaler)[0] for _ in range(4)]
    assert losses[-1] < losses[0] - 0.1


def test_overflow_in_the_first_step_does_no_harm(tmp_path, monkeypatch, capsys):
    class Scaler(torch.amp.GradScaler):
        def scale(self, loss):
            return super().scale(loss * (torch.inf if self.get_scale() == 65536 else 1))
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: Scaler(device))
    monkeypatch.setattr(torch, "empty_like", lambda x: torch.full_like(x, torch.nan))  # what it may hold
    main.main([*DRY, "--out", str(tmp_path)])
    state = torch.load(tmp_path / "checkpoint.pt")
    assert state["scaler"]["scale"] == 32768 and state["history"][0][0] < 3


def test_losses_are_means_over_images(capsys, monkeypatch):
    images, labels = torch.randn(1500, 3, 32, 32), torch.arange(1500) % 10
    images[1000:] *= 100  # the last chunk is smaller and worse
    net = torch.nn.Sequential(torch.nn.AvgPool2d(32), torch.nn.Flatten(), torch.nn.Linear(3, 10))
    loss, accuracy, right = main.test(net, images, labels)
    each = torch.nn.functional.cross_entropy(net(images), labels, reduction="none").double()
    assert loss == pytest.approx(each.mean().item(), rel=1e-5)
    optimizer = torch.optim.SGD(net.parameters(), 0)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    line = f"Average loss: {loss:.4f}, Accuracy: {right.sum()}/1500 ({accuracy:.2f}%)"
    assert line in capsys.readouterr().out
    for notebook in (False, True):  # a line, or a bar and no line
        monkeypatch.setattr(main, "NOTEBOOK", notebook)
        batches = zip(images.split(1000), labels.split(1000))
        figures = main.train(batches, 2, torch.float32, net, optimizer, scheduler, scaler)
        assert figures == pytest.approx((loss, accuracy))
        printed = capsys.readouterr().out
        assert f"Loss={loss:.4f} Batch_id=1 Accuracy={accuracy:.2f}" in printed
        assert ("%|" in printed) == notebook == (not re.search(r"^Loss=.*\d$", printed, re.M))


def test_dry_run_with_any_number_of_workers(tmp_path, capsys):
    weights = []
    for workers in ("0", "2"):
        main.main([*DRY, "--epochs", "3", "--out", str(tmp_path / workers), "--workers", workers])
        weights.append(torch.load(tmp_path / workers / "best.pt", weights_only=True))
        main.Net().load_state_dict(weights[-1])
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    output = capsys.readouterr()
    losses = [float(loss) for loss in re.findall(r"Loss=([\d.]+)", output.out)]
    assert losses[2] < losses[0] - 0.3 and output.err == ""
    assert re.search(r"Accuracy of plane : +\d+ %", output.out) and "means nothing" in output.out
    main.main([*DRY, "--out", str(tmp_path), "--batch-size", "1", "--dilated"])
    output = capsys.readouterr().out
    assert re.search(r"no stride.*measured 0 +met", output) and output.count("Epoch ") == 1
    for name in ("curves.png", "dataset_images.png"):
        assert main.cv2.imread(str(tmp_path / "0" / name)).std() > 20


def test_killed_and_resumed_run_ends_with_the_same_weights(tmp_path):
    command = [*DRY, "--epochs", "3", "--out"]
    main.main([*command, str(tmp_path / "whole")])
    process = subprocess.Popen([sys.executable, "-u", "main.py", *command, str(tmp_path / "killed")],
                               stdout=subprocess.PIPE, text=True, cwd=Path(main.__file__).parent)
    for line in process.stdout:
        if line == "Epoch 2:\n":
            process.kill()
    assert len(torch.load(tmp_path / "killed/checkpoint.pt")["history"]) == 1
    with pytest.raises(SystemExit, match="lr"):
        main.main([*command, str(tmp_path / "killed"), "--resume", "--lr", "0.2"])
    main.main([*command, str(tmp_path / "killed"), "--resume"])
    whole, killed = (torch.load(tmp_path / run / "checkpoint.pt")["model"] for run in ("whole", "killed"))
    assert all(torch.equal(whole[name], killed[name]) for name in whole)


@pytest.mark.parametrize("arguments, message", [
    (["--epochs", "0"], "--epochs"), (["--batch-size", "-1"], "--batch-size"), (["--lr", "nan"], "--lr"),
    (["--workers", "-1"], "--workers"), (["--seed", "-1"], "--seed"), (["--bogus"], "--bogus"),
    (["--ep", "2"], "--ep"), (["--out", "main.py"], "main.py"),
    (["--resume", "--out", "empty"], "checkpoint.pt"),
    (["--resume", "--out", "damaged"], "checkpoint.pt"), (["--lr", "1e9"], "epoch 1"),
    pytest.param(["--device", "cuda"], "cuda",
                 marks=pytest.mark.skipif(torch.cuda.is_available(), reason="GPU")),
])
def test_bad_input_gets_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "damaged").mkdir()
    for path in ("main.py", "damaged/checkpoint.pt"):
        (tmp_path / path).write_text("precious")
    with pytest.raises(SystemExit) as exit:
        main.main([*DRY, *arguments])
    assert message in (capsys.readouterr().err if exit.value.code == 2 else exit.value.code)
    assert (tmp_path / "damaged/checkpoint.pt").read_text() == "precious"


def test_gpu_without_kernels_gets_one_line(monkeypatch, capsys):
    def ones(*_, device):
        raise RuntimeError(f"CUDA error: no kernel image on {device}\nFor debugging consider this")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", ones)
    with pytest.raises(SystemExit, match="2"):
        main.main(DRY[:-2])
    assert re.search(r"error: .*no kernel image on cuda: .*--device cpu\n$", capsys.readouterr().err)


def test_download_goes_from_source_to_source(tmp_path, monkeypatch):
    names = [name for name, _ in main.CIFAR10.train_list + main.CIFAR10.test_list]
    batch = pickle.dumps({"data": random_images(2).reshape(2, -1).numpy(), "labels": [3, 5]})
    files = {name: batch for name in names}
    files["batches.meta"] = pickle.dumps({"label_names": list(main.CLASSES)})
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(f"{main.CIFAR10.base_folder}/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    md5 = {name: hashlib.md5(content).hexdigest() for name, content in files.items()}
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            if self.path in ("/gone", "/original"):
                return self.send_error(404)
            self.send_response(200)
            self.end_headers()
            if self.path == "/stalled":
                time.sleep(30)
            self.wfile.write(buffer.getvalue() if self.path == "/good" else b"rubbish")

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(main, "MIRRORS", (f"{url}/gone", f"{url}/stalled", f"{url}/corrupt"))
    for name, value in {"url": f"{url}/original", "tgz_md5": hashlib.md5(buffer.getvalue()).hexdigest(),
                        "train_list": [[name, md5[name]] for name in names[:5]],
                        "test_list": [[name, md5[name]] for name in names[5:]],
                        "meta": {**main.CIFAR10.meta, "md5": md5["batches.meta"]}}.items():
        monkeypatch.setattr(main.CIFAR10, name, value)
    start = time.monotonic()
    with pytest.raises(OSError, match=f"{main.CIFAR10.filename}.*--dry-run"):
        main.load_cifar10(tmp_path / "data", stall=0.5)
    assert list(dict.fromkeys(asked)) == ["/gone", "/stalled", "/corrupt", "/original"]
    assert time.monotonic() - start < 10
    monkeypatch.setattr(main.CIFAR10, "url", f"{url}/good")
    images, labels, test_images, _ = main.load_cifar10(tmp_path / "data", stall=0.5)
    assert images.shape == (10, 32, 32, 3) and test_images.shape == (2, 32, 32, 3) and labels[1] == 5
    asked.clear()
    (tmp_path / "data" / main.CIFAR10.filename).unlink()
    main.load_cifar10(tmp_path / "data")
    assert not asked
