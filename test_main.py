"""Tests of main.py: a minute on a CPU, without GPU, dataset or network. Run: python -m pytest"""
import http.client, io, os, pickle, re, shutil, socket, subprocess, sys, urllib.request
from pathlib import Path
from unittest.mock import Mock, patch
os.environ["OMP_NUM_THREADS"] = "1"  # more threads only wait for each other here
import cv2, main, numpy as np, pytest, torch
from torchvision.datasets import CIFAR10, utils
DRY = ["--dry-run", "--batch-size", "64", "--workers", "0", "--device", "cpu", "--epochs"]
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
on_devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NO_GPU)])
IMAGES = torch.randint(256, (50, 32, 32, 3), dtype=torch.uint8)

@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

def test_network_has_the_layers_of_the_assignment(capsys):
    net, image = main.Net(), torch.ones(1, 3, 128, 128, requires_grad=True)
    net.convblock1.requires_grad_(False)  # 10,208 parameters
    assert main.describe(net) == 83
    out = capsys.readouterr().out.replace(",", "")
    kinds, *numbers = zip(*re.findall(r"(\w\w)\w*-(\d+) +\[-1 (\d+) (\d+) \4\] +(\d+)", out))
    assert ["".join(kinds), *[list(map(int, column)) for column in numbers]] == [
        4 * "CoBaReDr" + "CoCoDeBaReDr" + "CoCoDeBaReDrCoBaReDr" + "CoCoBaReDr" + "CoReCoAv",
        list(range(1, 42)), 12 * [32] + 11 * [64] + 5 * [128] + 11 * [32] + 2 * [10],
        8 * [32] + 8 * [16] + 16 * [8] + [6] + 7 * [4] + [1],
        [864, 64, 0, 0, 9216, 64, 0, 0, 9216, 64, 0, 0, 18432, 128, 0, 0, 576, 4160, 4736, 128, 0,
         0, 576, 8320, 8896, 256, 0, 0, 4096, 64, 0, 0, 9216, 9216, 64, 0, 0, 9216, 0, 2880, 0]]
    totals = re.findall(r"(?:params|\(MB\)): ([\d.]+)", out)
    assert totals == ["86816", "76608", "10208", "0.01", "3.38", "0.33", "3.72"]
    assert torch.equal(torch.jit.script(net)(image[..., :32, :32]), net(image[..., :32, :32]))
    torch.nn.utils.vector_to_parameters(torch.full((86816,), 0.1), net.parameters())
    x, reached = image, []  # with these weights no contribution cancels another
    for block in net.children():
        x = block(x)
        gradient, = torch.autograd.grad(x[0, 0, 12, 12], image, retain_graph=True)
        reached.append(gradient.sum((0, 1, 3)).count_nonzero())
    fields = re.findall(r"^ +(?:\w+block\d|AvgPool\S+) .* (\d+)$", out, re.M)
    assert list(map(int, fields)) == reached == [5, 7, 11, 15, 23, 55, 71, 83]

def test_dilated_network_is_the_same_computed_densely():
    strided, dilated = main.Net().double(), main.Net(dilated=True).double()
    x = torch.randn(16, 3, 32, 32).double()
    strided(x)  # so that the running means are not all 0
    dilated.load_state_dict(strided.state_dict())
    few, many = (torch.nn.Sequential(*net.eval().children())[:-1](x) for net in (strided, dilated))
    assert few.std() > 1e-4 and many.shape == (16, 10, 16, 16)  # 32 - 2 · 8, so without a stride
    assert torch.allclose(few, many[:, :, ::4, ::4], rtol=0, atol=1e-12)
    assert torch.allclose(dilated(x), many.mean((2, 3)), rtol=0, atol=1e-12)

def test_goals_are_measured(capsys):
    best = dict.fromkeys(["train", "test"], {"accuracy": 91.5})
    last = dict.fromkeys(["train", "test"], {"accuracy": 87.0, "by_class": range(10)})
    main.print_results(main.Net(), 53, "cuda", [best, last])
    out = capsys.readouterr().out
    assert "NOT" not in out and "horse :  7 %" in out and "91.50" in out and "87.00" in out
    bad = [torch.nn.MaxPool2d(4), torch.nn.Linear(1, 50_000), main.DepthwiseSeparable(1, 1)]
    last["test"]["accuracy"] = 86.9
    main.print_results(torch.nn.Sequential(*bad), 52, "cpu", [last])
    assert capsys.readouterr().out.count("NOT met") == 9  # all

def test_augmentations_are_the_assignments_and_independent(monkeypatch):
    assert [(type(transform).__name__, transform.p) for transform in main.AUGMENT] == [
        ("HorizontalFlip", 0.3), ("ShiftScaleRotate", 0.5), ("CoarseDropout", 0.1), ("ToGray", 0.1)]
    values = main.AUGMENT[1].get_transform_init_args()
    names = ("shift_limit_x", "shift_limit_y", "scale_limit", "rotate_limit", "border_mode")
    assert [np.max(values[name]) for name in names] == pytest.approx([0.1, 0.1, 0.1, 30, 4])
    for white in np.full((100, 32, 32, 3), 255, np.uint8):
        image = main.AUGMENT[2](image=white, force_apply=True)["image"]
        hole = np.argwhere((image == (125, 123, 114)).all(axis=2))  # the mean colour
        assert len(hole) == 256 and (np.ptp(hole, axis=0) == 15).all()  # 16x16
    images = torch.zeros(4000, 32, 32, 3, dtype=torch.uint8)
    images[:, :, :16, 0] = 200  # the left half is red
    for transform, p in zip(main.AUGMENT, (0.3, 0, 0, 0.5)):
        monkeypatch.setattr(transform, "p", p)
    batch, _ = main.AugmentedBatches(images, torch.arange(4000))[0, 1, 0, 4000]
    flip = batch[:, 0, 0, 0] < batch[:, 0, 31, 0]
    grey = (batch[..., 0] == batch[..., 1]).all((1, 2))
    assert np.bincount(2 * flip + grey) / 4000 == pytest.approx([0.35, 0.35, 0.15, 0.15], abs=0.03)

def test_batches_depend_on_seed_and_step_and_are_normalized():
    numbers, orders = torch.arange(50), set()
    dataset = main.AugmentedBatches(0 * IMAGES + numbers.byte().view(50, 1, 1, 1), numbers)
    for seed, epoch in ((0, 1), (0, 2), (1, 1)):
        batches = [dataset[seed, epoch, start, 16] for start in range(0, 50, 16)]
        images, labels = map(np.concatenate, zip(*batches))
        assert (np.median(images, axis=(1, 2, 3)) == labels).all()
        orders.add(tuple(labels))
    assert len(orders) == 3 and all(sorted(order) == [*range(50)] for order in orders)
    twins = main.AugmentedBatches(IMAGES[[0, 0]], numbers[:2])
    assert len({twins[(*key, 1)][0].tobytes() for key in np.ndindex(2, 20, 2)}) > 40  # of 80
    (x, *_), _ = next(main.load_batches([(IMAGES, numbers)], [0], 0, "cpu"))
    normalize = main.A.Normalize((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
    assert np.allclose(x.permute(1, 2, 0), normalize(image=IMAGES[0].numpy())["image"], atol=1e-5)

@on_devices
def test_muon_is_its_definition_cheap_in_launches_and_lowers_the_loss(device):
    class Calls(torch.utils._python_dispatch.TorchDispatchMode):
        count = 0
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += not function.is_view
            return function(*args, **(kwargs or {}))
    net = main.Net().to(device, memory_format=torch.channels_last)
    parameters = list(net.parameters())
    optimizer = main.Muon(parameters, lr=0.02, weight_decay=0.05)
    averages, expected = [0] * len(parameters), [p.clone() for p in parameters]
    scaler, images = torch.amp.GradScaler(device), torch.randn(16, 3, 32, 32, device=device)
    for factor in (torch.inf, 1, 1):  # an overflow changes nothing
        optimizer.zero_grad()
        scaler.scale(net(images).square().mean() * factor).backward()
        scaler.unscale_(optimizer)
        for i, p in enumerate(parameters if factor == 1 else []):
            kernel = p.ndim == 4 and p.shape[1] > 1
            lr, decay, momentum = (0.02, 0.05, 0.95) if kernel else (0.1, 5e-4, 0.9)
            gradient = p.grad if kernel else p.grad + decay * p
            averages[i] = momentum * averages[i] + gradient
            update = gradient + momentum * averages[i]
            if kernel:  # one by one, neither padded nor transposed
                update = main.orthogonalize(update.flatten(1)[None]).reshape(p.shape) + decay * p
            expected[i] = p - lr * update
        with Calls() as calls:
            scaler.step(optimizer)
        scaler.update()
        assert calls.count <= 100
        assert all(torch.allclose(p, q, rtol=0, atol=1e-6) for p, q in zip(parameters, expected))
    constant = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1)
    batches = main.load_batches([(IMAGES[:16], torch.arange(16) % 10)], 8 * [0], 0, device)
    losses = [main.train(batches, 2, net.eval(), optimizer, constant)["loss"] for _ in range(4)]
    assert losses[3] < losses[0] - 0.1 and net.training and constant.last_epoch == 8

def test_orthogonalize_brings_singular_values_near_one():
    for shape in ((32, 27), (32, 288), (64, 288), (64, 64), (128, 64), (32, 128), (10, 288)):
        u, s, v = torch.linalg.svd(torch.randn(shape), full_matrices=False)
        result, = main.orthogonalize((u * torch.linspace(1, 0.1, len(s)) @ v)[None])
        assert (torch.linalg.svdvals(result) - 0.95).abs().max() < 0.35  # 0.6 to 1.3

def test_loss_and_accuracy_are_means_of_all_images(capsys):
    logits, labels, net = torch.randn(1500, 10), torch.arange(1500) % 10, torch.nn.PReLU(init=1)
    logits[1000:] *= 100  # the last batch is smaller and worse; this network changes nothing
    loss = torch.nn.functional.cross_entropy(logits, labels).item()
    right = (logits.argmax(1) == labels).double()
    accuracy, by_class = 100 * right.mean().item(), (100 * right.view(150, 10).mean(0)).tolist()
    batches = zip(logits.split(1000), labels.split(1000))
    for row in (main.train(batches, 2, net, Mock(), Mock()), main.test(net, logits, labels)):
        torch.testing.assert_close(row, dict(loss=loss, accuracy=accuracy, by_class=by_class))
    line = f"Average loss: {loss:.4f}, Accuracy: {right.sum():.0f}/1500 ({accuracy:.2f}%)\n"
    assert capsys.readouterr().out == f"Training set: {line}Test set: {line}" and not net.training

@on_devices
@patch.multiple(torch.UntypedStorage, _share_fd_cpu_=lambda _: os._exit(1))  # no /dev/shm
def test_dry_run_with_any_number_of_workers(device, capsys):
    for n in "02":
        main.main([*DRY, "1", "--out", n, "--workers", n, "--device", device])
    output = capsys.readouterr()
    assert "means nothing" in output.out and output.out.count("/500 ") == 2 and output.err == ""
    main.Net(dilated=True).load_state_dict(torch.load("0/dry-run/model.pt", weights_only=True))
    assert Path("0/dry-run/model.pt").read_bytes() == Path("2/dry-run/model.pt").read_bytes()
    curves, images = (cv2.imread(f"0/dry-run/{name}.png") for name in ("curves", "dataset_images"))
    blue, red = (np.argwhere((curves == color).all(2)) for color in ((180, 119, 31), (40, 39, 214)))
    assert len(blue) > 0 and len(red) > 50 and (images[:34] != images[34:68]).any()  # augmented

def test_killed_run_goes_on_and_ends_with_the_same_weights(monkeypatch):
    seen, get = [], main.AugmentedBatches.__getitem__
    monkeypatch.setattr(main.AugmentedBatches, "__getitem__", lambda *a: seen.append(a) or get(*a))
    whole, killed = ([*DRY, *f"3 --seed 4 --resume --workers {n} --out {n}".split()] for n in "02")
    with subprocess.Popen([sys.executable, main.__file__, *killed], stdout=subprocess.PIPE) as run:
        assert b"Epoch 2:\n" in run.stdout  # waits for it
        run.kill()
        run.communicate(timeout=30)  # until its workers have ended, too
    for other in ("--lr 9", "--weight-decay 9", "--seed 9", "--batch-size 9", "--dilated"):
        with pytest.raises(SystemExit, match="its options are.*use another --out"):
            main.main([*killed, *other.split()])
    for options in (whole, killed, killed):  # 3 epochs, 2 and none
        main.main(options)
    keys = [(384, 4, epoch, start, 64) for epoch in (1, 2, 3) for start in range(0, 384, 64)]
    assert [(len(dataset), *key) for dataset, key in seen] == keys
    assert Path("0/dry-run/model.pt").read_bytes() == Path("2/dry-run/model.pt").read_bytes()

def test_bad_input_gets_one_line(capsys):
    Path("dry-run/checkpoint.tmp").mkdir(parents=True)  # as unfit to write to as a full disk
    Path("dry-run/checkpoint.pt").write_text("precious")
    for options, name in {"--epochs 0": "epochs", "--batch-size -1": "batch-size", "--lr nan": "lr",
                          "--workers -1": "workers", f"--seed {10**20}": "seed",
                          "--out /dev/null": "/dev/null", "--lr 0.1": "checkpoint.tmp",
                          "--lr 1e18": "try a lower", "--resume --dilated": "unfit"}.items():
        with pytest.raises(SystemExit) as raised:
            main.main([*DRY, "1", *options.split()])
        out, err = capsys.readouterr()
        assert name in f"{raised.value.code}\n{err}".splitlines()[-1]
    assert Path("dry-run/checkpoint.pt").read_text() == "precious"
    assert "[-1, 10, 16, 16]" in out  # --dilated reaches the network

def test_only_what_the_user_can_mend_gets_one_line(monkeypatch):
    lacks = "can't allocate memory", "DataLoader worker (pid 7) is", "no kernel\nI", "out of memory"
    mendable = [OSError(28, "No space"), MemoryError(), torch.OutOfMemoryError("CUDA"),
                KeyboardInterrupt(), *map(RuntimeError, lacks)]
    bugs = [ValueError("a bug"), RuntimeError("Caught TypeError in DataLoader worker process 0.")]
    monkeypatch.setattr(main, "run", Mock(side_effect=mendable + bugs))
    for error in mendable + bugs:
        with pytest.raises(type(error) if error in bugs else SystemExit, match=r"\A\n?.+\Z"):
            main.main([])

@patch.multiple(main, KAGGLE=Path("in put"), URLS=[f"http://{name}" for name in "abcd"])
def test_cifar10_is_found_or_fetched(monkeypatch, capsys):
    class Response(io.BytesIO):
        url, length = None, 1
    data, folder = Path("data"), Path(CIFAR10.base_folder)
    folder.mkdir()
    images = IMAGES[:2].permute(0, 3, 1, 2).flatten(1).numpy()
    for name, _ in [*CIFAR10.train_list, *CIFAR10.test_list, ("batches.meta", "")]:
        (folder / name).write_bytes(pickle.dumps(dict(data=images, labels=[3, 5], label_names=[])))
    archive = shutil.make_archive("ok", "gztar", ".", folder)
    monkeypatch.setattr(utils, "check_md5", lambda file, _: Path(file).read_bytes() != b"broken")
    contents = b"", b"broken", b"", Path(archive).read_bytes()  # b"": is it redirected?
    answers = [OSError(), http.client.BadStatusLine(""), *map(Response, contents)] + 9 * [OSError()]
    monkeypatch.setattr(urllib.request, "urlopen", Mock(side_effect=answers))
    for (images, labels), n in zip(main.load_cifar10(data), (5, 1)):
        assert torch.equal(images, IMAGES[:2].repeat(n, 1, 1, 1)) and labels.tolist() == n * [3, 5]
    assert re.findall("from (http.*)", capsys.readouterr().out) == main.URLS
    assert socket.getdefaulttimeout() == 8  # else a silent source is waited for for ever
    main.load_cifar10(data / folder)  # --data may be the folder itself
    for place in ("b/four/levels/down", "c/cifar-10-batches-py/cifar-10-batches-py"):
        shutil.copytree(folder, main.KAGGLE / place)
        assert len(main.load_cifar10(Path("none"))[0][1]) == 10
        (main.KAGGLE / place / "test_batch").write_text("broken")
    (main.KAGGLE / CIFAR10.filename).write_bytes(contents[3][:-99])  # cut off
    with pytest.raises(SystemExit, match=f"{CIFAR10.filename}.*--dry-run"):
        main.load_cifar10(Path("empty"))
    shutil.copy(archive, main.KAGGLE / CIFAR10.filename)
    assert len(main.load_cifar10(Path("new"))[0][1]) == 10  # from an archive, without network
