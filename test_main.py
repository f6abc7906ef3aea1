"""Tests of main.py: a minute on a CPU, without GPU, dataset or network. Run: python -m pytest"""
import hashlib, io, os, pickle, re, socket, subprocess, sys, tarfile, urllib
os.environ["OMP_NUM_THREADS"] = "1"  # more threads only wait for each other here
import cv2, numpy as np, pytest, torch
from torch.nn.functional import cross_entropy, pad
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.datasets import CIFAR10
import main

pytestmark = pytest.mark.filterwarnings("ignore:ShiftScaleRotate")  # pytest drops main's own filter
DRY = ["--dry-run", "--batch-size", "64", "--workers", "0", "--device", "cpu", "--epochs"]
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
on_devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NO_GPU)])

def random_images(count):
    return torch.randint(256, (count, 32, 32, 3), dtype=torch.uint8)

def kernels_of(net):
    return [p for p in net.parameters() if p.ndim == 4 and p.shape[1] > 1]

def test_network_has_the_layers_of_the_assignment(capsys):
    net, images = main.Net().eval(), torch.randn(2, 3, 32, 32)
    assert torch.equal(torch.jit.script(net)(images), net(images))
    net.convblock1.requires_grad_(False)  # 10,208 parameters
    assert main.describe(net) == 83
    out = capsys.readouterr().out.replace(",", "")
    kinds, *numbers = zip(*re.findall(r"(\w+)-(\d+) +\[-1 (\d+) (\d+) \4\] +(\d+)", out))
    assert "".join(kind[:2] for kind in kinds) == (
        4 * "CoBaReDr" + "CoCoDeBaReDr" + "CoCoDeBaReDrCoBaReDr" + "CoCoBaReDr" + "CoReCoAv")
    assert [list(map(int, column)) for column in numbers] == [
        list(range(1, 42)), 12 * [32] + 11 * [64] + 5 * [128] + 11 * [32] + 2 * [10],
        8 * [32] + 8 * [16] + 16 * [8] + [6] + 7 * [4] + [1],
        [864, 64, 0, 0, 9216, 64, 0, 0, 9216, 64, 0, 0, 18432, 128, 0, 0, 576, 4160, 4736, 128, 0, 0,
         576, 8320, 8896, 256, 0, 0, 4096, 64, 0, 0, 9216, 9216, 64, 0, 0, 9216, 0, 2880, 0]]
    assert re.search(r"Total params: 86816\nTrainable params: 76608\nNon.* 10208\nInput size", out)
    assert re.findall(r" \(MB\): ([\d.]+)", out) == ["0.01", "3.38", "0.33", "3.72"]

def test_receptive_field_is_what_gradients_reach(capsys):
    net = main.Net().eval().double()
    for parameter in net.parameters():
        torch.nn.init.constant_(parameter, 0.1)  # positive: no contribution cancels another
    x = image = torch.ones(1, 3, 256, 256, dtype=torch.double, requires_grad=True)
    reached = []
    for block in net.children():
        x = block(x)
        middle = x[0, 0, x.shape[2] // 2, x.shape[3] // 2]
        gradient, = torch.autograd.grad(middle, image, retain_graph=True)
        reached.append(np.ptp(gradient[0].abs().sum((0, 2)).nonzero().numpy()) + 1)
    main.describe(main.Net())
    table = re.findall(r"^ +(?:\w+block\d|AvgPool\S+) .* (\d+)$", capsys.readouterr().out, re.M)
    assert list(map(int, table)) == reached == [5, 7, 11, 15, 23, 55, 71, 83]

def test_dilated_network_is_the_same_computed_densely():
    strided, dilated = main.Net().double(), main.Net(dilated=True).double()
    images = torch.randn(16, 3, 32, 32).double()
    strided(images)  # so that the running means are not all 0
    dilated.load_state_dict(strided.state_dict())
    assert all(np.max(getattr(layer, "stride", 1)) == 1 for layer in dilated.modules())
    few, many = (torch.nn.Sequential(*list(net.eval().children())[:-1])(images)
                 for net in (strided, dilated))
    assert few.shape == (16, 10, 4, 4) and few.std() > 1e-4
    assert torch.allclose(few, many[:, :, ::4, ::4], rtol=0, atol=1e-12)
    assert torch.allclose(dilated(images), many.mean((2, 3)), rtol=0, atol=1e-12)

def test_goals_are_measured(capsys):
    def results(net, field, device, accuracy):
        row = {part: {"accuracy": accuracy, "by_class": range(10)} for part in ("train", "test")}
        main.print_results(net, field, device, [{**row, "train": {"accuracy": 91.5}}, row])
        return capsys.readouterr().out
    net, out = main.Net(), results(main.Net(), 53, "cuda", 87.0)
    assert "NOT" not in out and "horse :  7 %" in out and "91.50" in out and "87.00" in out
    net.gap = torch.nn.Sequential(torch.nn.MaxPool2d(4), torch.nn.Linear(1, 20_000))
    net.transblock2[0] = torch.nn.Identity()
    net.transblock3[0].dilation = net.transblock3[1].dilation = (1, 1)
    assert results(net, 52, "cpu", 86.9).count("NOT met") == 9  # all

def test_augmentations_are_the_assignments():
    flip, shift, hole, grey = main.AUGMENT
    assert [type(transform).__name__ for transform in main.AUGMENT] == [
        "HorizontalFlip", "ShiftScaleRotate", "CoarseDropout", "ToGray"]
    assert (flip.p, shift.p) == (0.3, 0.5) and grey.p >= 0.1 and hole.p >= 0.1
    values = shift.get_transform_init_args()
    names = ("shift_limit_x", "shift_limit_y", "scale_limit", "rotate_limit")
    assert [values[name][1] for name in names] == pytest.approx([0.1, 0.1, 0.1, 30])
    for image in np.full((100, 32, 32, 3), 255, np.uint8):
        params = hole.get_params_dependent_on_data({"shape": image.shape}, {})
        covered = np.argwhere((hole.apply(image, **params) == (125, 123, 114)).all(axis=2))
        assert len(covered) == 256 and (np.ptp(covered, axis=0) == 15).all()  # 16x16, mean colour

def test_flip_and_grey_are_independent(monkeypatch):
    images = torch.zeros(4000, 32, 32, 3, dtype=torch.uint8)
    images[:, :, :16, 0] = 200  # the left half is red
    for transform, p in zip(main.AUGMENT, (0.3, 0, 0, 0.5)):
        monkeypatch.setattr(transform, "p", p)
    batch, _ = main.AugmentedBatches(images, torch.arange(4000))[0, 1, 0, 4000]
    flip = batch[:, 0, 0, 0] < batch[:, 0, 31, 0]
    grey = (batch[..., 0] == batch[..., 1]).all((1, 2))
    cases = [(flip & grey).mean(), (flip & ~grey).mean(), (~flip & grey).mean()]
    assert cases == pytest.approx([0.15, 0.15, 0.35], abs=0.03)

def test_batches_depend_on_seed_and_step_alone(monkeypatch):
    fifty = random_images(50)
    def batches(seed, epochs, size=16, workers=0, images=fifty):
        keys = [(seed, epoch, i, size) for epoch in epochs for i in range(0, len(images), size)]
        dataset = main.AugmentedBatches(images, torch.arange(len(images)))
        return list(main.load_batches(dataset, keys, workers, "cpu"))
    images, labels = zip(*batches(0, (1, 2)))
    first, second = torch.cat(labels).split(50)
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(50))
    for name in ("_share_fd_cpu_", "_share_filename_cpu_"):
        monkeypatch.setattr(torch.UntypedStorage, name, None)  # as if there were no /dev/shm
    assert torch.equal(images[6], batches(0, [2], workers=2)[2][0])
    twice = batches(0, range(1, 21), size=1, images=random_images(1)[[0, 0]])
    assert len({image.numpy().tobytes() for image, _ in twice}) > 20  # in an epoch and between
    image, label = batches(1, [1])[0]
    assert not (torch.equal(images[0], image) or torch.equal(labels[0], label))
    assert not torch.equal(first, second)
    batch, _ = next(main.load_batches([(fifty, first)], [0], 0, "cpu"))
    expected = main.A.Normalize(main.MEAN, main.STD)(image=fifty[3].numpy())["image"]
    assert np.allclose(batch[3].permute(1, 2, 0), expected, atol=1e-5)

def test_orthogonalize_brings_singular_values_near_one():
    for kernel in kernels_of(main.Net()):
        u, s, v = torch.linalg.svd(torch.randn(kernel.shape).flatten(1), full_matrices=False)
        matrix = u * torch.linspace(1, 0.1, len(s)) @ v
        result, padded = (main.orthogonalize(x[None])[0] for x in (matrix, pad(matrix, (0, 9, 0, 5))))
        values = torch.linalg.svdvals(result)
        assert 0.6 < values.min() and values.max() < 1.3
        assert torch.allclose(padded, pad(result, (0, 9, 0, 5)), atol=1e-5)

@on_devices
def test_muon_is_its_definition_and_cheap_in_launches(device):
    class Calls(TorchDispatchMode):
        count = 0
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += not function.is_view
            return function(*args, **(kwargs or {}))
    net = main.Net().to(device, memory_format=torch.channels_last)
    optimizer = main.Muon(list(net.parameters()), lr=0.02, weight_decay=0.05)
    kernels, rest = (group["params"] for group in optimizer.param_groups)
    assert list(map(id, kernels)) == list(map(id, kernels_of(net))) and len(kernels) == 11
    assert {id(p) for p in kernels + rest} == {id(p) for p in net.parameters()} and len(rest) == 20
    averages, before = [0] * 11, [p.clone() for p in net.parameters()]
    scaler, images = torch.amp.GradScaler(device), torch.randn(16, 3, 32, 32, device=device)
    for factor in (torch.inf, 1, 1):
        optimizer.zero_grad()
        scaler.scale(net(images).square().mean() * factor).backward()
        scaler.unscale_(optimizer)
        expected = [kernel * (1 - 0.02 * 0.05) for kernel in kernels]
        for i, gradient in enumerate(kernel.grad for kernel in kernels):  # one by one
            averages[i] = 0.95 * averages[i] + gradient if factor == 1 else 0
            matrix = (gradient + 0.95 * averages[i]).flatten(1)
            tall = len(matrix) > matrix.shape[1]
            update, = main.orthogonalize((matrix.T if tall else matrix)[None])
            expected[i] -= 0.02 * (update.T if tall else update).reshape(gradient.shape)
        with Calls() as calls:
            scaler.step(optimizer)
        scaler.update()
        same = [torch.equal(p, old) for p, old in zip(net.parameters(), before)]
        assert calls.count <= 100 and (all(same) if factor > 1 else not any(same))  # an overflow
        assert factor > 1 or all(torch.allclose(p, q, atol=1e-5) for p, q in zip(kernels, expected))

@on_devices
def test_training_lowers_the_loss_and_prints_means(device, capsys):
    net = main.Net().to(device, memory_format=torch.channels_last)
    optimizer = main.Muon(list(net.parameters()), 0.02, 0.05)
    constant = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1)
    batches = main.load_batches([(random_images(16), torch.arange(16) % 10)], 8 * [0], 0, device)
    losses = [main.train(batches, 2, net, optimizer, constant)["loss"] for _ in range(4)]
    assert losses[3] < losses[0] - 0.1
    images, labels = torch.randn(1500, 3, 32, 32), torch.arange(1500) % 10
    images[1000:] *= 100  # the last batch is smaller and worse
    net = torch.nn.Sequential(torch.nn.AvgPool2d(32), torch.nn.Flatten(), torch.nn.Linear(3, 10))
    loss = cross_entropy(net(images), labels, reduction="none").double().mean().item()
    right = (net(images).argmax(1) == labels).double()
    accuracy, by_class = 100 * right.mean().item(), (100 * right.view(150, 10).mean(0)).tolist()
    capsys.readouterr()
    batches, sgd = zip(images.split(1000), labels.split(1000)), torch.optim.SGD(net.parameters(), 0)
    for row in (main.train(batches, 2, net, sgd, constant), main.test(net, images, labels)):
        assert [row["loss"], row["accuracy"], *row["by_class"]] == pytest.approx([loss, accuracy, *by_class])
    line = f"Average loss: {loss:.4f}, Accuracy: {right.sum():.0f}/1500 ({accuracy:.2f}%)\n"
    assert capsys.readouterr().out == f"Training set: {line}Test set: {line}"

@on_devices
def test_dry_run_with_any_number_of_workers(device, tmp_path, capsys):
    for workers in ("0", "2"):
        out = str(tmp_path / workers)
        main.main([*DRY, "1", "--out", out, "--workers", workers, "--device", device])
    output = capsys.readouterr()
    assert "means nothing" in output.out and output.out.count("Test set") == 2 and output.err == ""
    one, two = (torch.load(tmp_path / out / "model.pt", weights_only=True) for out in ("0", "2"))
    main.Net(dilated=True).load_state_dict(one)
    assert all(torch.equal(one[name], two[name]) for name in one)
    curves, images = (cv2.imread(f"{out}/{name}.png") for name in ("curves", "dataset_images"))
    assert images.std() > 50 and (curves.min(axis=2) < curves.max(axis=2)).sum() > 50  # four dots

def test_killed_run_goes_on_and_ends_with_the_same_weights(tmp_path, capsys):
    whole, killed = ([*DRY, "3", "--resume", "--out", str(tmp_path / name)] for name in "wk")
    main.main(whole)  # without a checkpoint, from the start
    assert "after 0 epochs" in capsys.readouterr().out
    process = subprocess.Popen([sys.executable, main.__file__, *killed], stdout=subprocess.PIPE)
    for line in process.stdout:
        if line == b"Epoch 2:\n":
            process.kill()
    with pytest.raises(SystemExit, match="seed"):
        main.main([*killed, "--seed", "1"])
    for left in (2, 0):  # then only the results
        main.main(killed)
        assert capsys.readouterr().out.count("Epoch ") == left
    one, two = (torch.load(tmp_path / name / "model.pt", weights_only=True) for name in "wk")
    assert all(torch.equal(one[name], two[name]) for name in one)

def test_bad_input_gets_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for path in ("file", "checkpoint.pt"):
        (tmp_path / path).write_text("precious")
    for options, name in (("--epochs 0", "epochs"), ("--batch-size -1", "batch_size"),
                          ("--lr nan", "lr"), ("--workers -1", "workers"), ("--bogus", "--bogus"),
                          (f"--seed {10**20}", "seed"), ("--device gpu", "--device"),
                          ("--out file", "file"), ("--resume", "checkpoint.pt")):
        with pytest.raises(SystemExit) as exit:
            main.main([*DRY, "1", *options.split()])
        error = capsys.readouterr().err if exit.value.code == 2 else exit.value.code
        assert name in error.splitlines()[-1]
    assert (tmp_path / "checkpoint.pt").read_text() == (tmp_path / "file").read_text() == "precious"
    for part in ("train", "test"):
        monkeypatch.setattr(main, part, lambda *_: {"loss": torch.nan})
    with pytest.raises(SystemExit, match="epoch 1.*--lr"):
        main.main([*DRY, "1", "--dilated"])
    assert "[-1, 10, 16, 16]" in capsys.readouterr().out  # --dilated reaches the network

@pytest.mark.parametrize("error, is_line", [
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), True),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), True),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to"), True), (MemoryError(), True),
    (RuntimeError("CUDA error: no kernel image is available\nFor debugging"), True),
    (KeyboardInterrupt(), True), (OSError(28, "No space left on device"), True),
    (RuntimeError("Caught TypeError in DataLoader worker process 0."), False),
    (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False), (ValueError(), False)])
def test_only_what_the_user_can_mend_gets_one_line(error, is_line, monkeypatch):
    def run(args):
        raise error
    monkeypatch.setattr(main, "run", run)
    with pytest.raises(SystemExit if is_line else type(error)) as raised:
        main.main([])
    assert not is_line or len(raised.value.code.strip().splitlines()) == 1

def test_cifar10_is_found_or_fetched(tmp_path, monkeypatch, capsys):
    data = pickle.dumps({"data": random_images(2).reshape(2, -1).numpy(), "labels": [3, 5]})
    names = [name for name, _ in CIFAR10.train_list + CIFAR10.test_list]
    files = {**dict.fromkeys(names, data), "batches.meta": pickle.dumps({"label_names": []})}
    buffer, md5 = io.BytesIO(), {name: hashlib.md5(files[name]).hexdigest() for name in files}
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    for name, value in {"tgz_md5": hashlib.md5(buffer.getvalue()).hexdigest(), "base_folder": "",
                        "train_list": [[name, md5[name]] for name in names[:5]], "url": "",
                        "test_list": [[name, md5[name]] for name in names[5:]],
                        "meta": {**CIFAR10.meta, "md5": md5["batches.meta"]}}.items():
        monkeypatch.setattr(CIFAR10, name, value)

    def urlopen(request):
        asked.append(request.full_url)
        assert socket.getdefaulttimeout() == 8  # else a silent source is waited for for ever
        if "gone" in request.full_url:
            raise urllib.error.URLError("gone")
        response = io.BytesIO(buffer.getvalue() if "good" in request.full_url else b"rubbish")
        response.url, response.length = request.full_url, 1
        return response
    asked, urls = [], ["http://gone", "http://bad"]
    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    monkeypatch.setattr(main, "URLS", urls)
    with pytest.raises(SystemExit, match=f"{CIFAR10.filename}.*--dry-run"):
        main.load_cifar10(tmp_path / "data")
    assert list(dict.fromkeys(asked)) == re.findall("from (http.*)", capsys.readouterr().out) == urls
    urls.append("http://good")
    (images, labels), (test_images, _) = main.load_cifar10(tmp_path / "data")
    assert images.shape == (10, 32, 32, 3) and test_images.shape == (2, 32, 32, 3)
    assert images.dtype == torch.uint8 and labels[:2].tolist() == [3, 5]
    urls.clear()
    folder, kaggle = tmp_path / "data/cifar-10-batches-py", tmp_path / "in put"
    main.load_cifar10(folder)  # --data may be the folder itself
    monkeypatch.setattr(main, "KAGGLE", kaggle)
    (kaggle / "a").mkdir(parents=True)
    (kaggle / "a/data_batch_1").write_text("not whole")
    for place in ("b/four/levels/down", "c/cifar-10-batches-py/cifar-10-batches-py"):
        (kaggle / place).parent.mkdir(parents=True)
        folder = folder.replace(kaggle / place)
        assert len(main.load_cifar10(tmp_path / "none")[0][1]) == 10
    folder.rename(tmp_path / "away")
    (kaggle / CIFAR10.filename).write_bytes(buffer.getvalue())
    assert len(main.load_cifar10(tmp_path / "new")[0][1]) == 10  # from an archive, without network
    assert not (tmp_path / "none").exists()
