"""Tests of main.py: a minute on a CPU, without GPU, dataset or network. Run: python -m pytest"""
import copy, hashlib, os, pickle, re, shutil, socket, subprocess, sys
from pathlib import Path
os.environ["OMP_NUM_THREADS"] = "1"  # more threads only wait for each other here
import main, numpy as np, pytest, torch
from torch import nn
from torchvision.datasets import CIFAR10, utils

GPU = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))
IMAGES = (5 * torch.arange(50) + 1).byte().view(50, 1, 1, 1).repeat(1, 32, 32, 3)
IMAGES[:, :, 16:] += 2  # a number can be read from each image, and whether it is flipped

@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

def dry_run(options):
    main.main(["--dry-run", "--batch-size", "64", "--device", "cpu", *options.split()])

def weights(out):
    return str(torch.load(f"{out}/dry-run/checkpoint.pt", weights_only=True)["model"])

# ------------------------------ Network ------------------------------
def test_shapes_parameters_and_receptive_fields(capsys):
    net = main.Net()
    main.describe(net)
    out = capsys.readouterr().out
    layers = re.findall(r"(\w+)-(\d+) .*\] +([\d,]+) +\d+", out)
    assert [int(number) for _, number, _ in layers] == list(range(1, 42))
    assert sum(int(params.replace(",", "")) for _, _, params in layers) == 86816
    assert [number for kind, number, params in layers if params == "0" and "Sep" in kind] == ["19", "25"]
    assert "38.60 MFLOPs, 19.30 MMACs, 20.03 MDMAs" in out and "Size (MB): 3.72" in out
    blocks = re.findall(r"(?:block\d|Avg\S+|Net) +(\[.*\]) +([\d,]+) +(\d+)", out)
    shapes, params, fields = [" ".join(column) for column in zip(*blocks)]
    assert params == "10,208 9,280 18,560 4,864 13,312 18,496 12,096 0 86,816"
    assert shapes.replace("-1, ", "") == ("[32, 32, 32] [32, 16, 16] [64, 16, 16] [64, 8, 8] "
                                          "[32, 8, 8] [32, 4, 4] [10, 4, 4] [10, 1, 1] [10]")
    nn.utils.vector_to_parameters(torch.full((86816,), 0.1), net.parameters())
    x = image = torch.ones(1, 3, 128, 128, requires_grad=True)
    reached = []  # with these weights no contribution cancels another
    for block in net.children():
        x = block(x)
        middle = x[0, 0, x.shape[2] // 2, x.shape[2] // 2]
        gradient, = torch.autograd.grad(middle, image, retain_graph=True)
        reached.append(gradient.sum((0, 1, 3)).count_nonzero().item())
    assert fields == "5 7 11 15 23 55 71 83 83" and reached == [5, 7, 11, 15, 23, 55, 71, 83]

def test_dilated_network_is_the_same_computed_densely():
    strided = main.Net().double()
    dilated = main.Net(dilated=True).double()
    x = torch.randn(16, 3, 32, 32).double()
    strided(x)  # so that the running means are not all 0
    dilated.load_state_dict(strided.state_dict())
    few = nn.Sequential(*strided.eval().children())[:-1](x)
    many = nn.Sequential(*dilated.eval().children())[:-1](x)
    assert few.std() > 1e-4 and many.shape == (16, 10, 16, 16)  # 32 - 2 * 8: no stride
    assert torch.allclose(few, many[:, :, ::4, ::4], rtol=0, atol=1e-12)
    assert torch.allclose(dilated(x), many.mean((2, 3)), rtol=0, atol=1e-12)

class Attention(nn.Module):  # squeeze and excitation, here by a layer that returns a tuple
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(32, 32)
        self.scale = nn.Parameter(torch.ones(()))
    def forward(self, x):
        return self.rnn(x.mean((2, 3)))[0][:, :, None, None] * x * self.scale

def test_another_block_is_described(capsys):
    net = main.Net()
    net.convblock1.append(Attention())
    main.describe(net)
    assert re.search(r"Attention-9 [^@]*Total params: 95,265\n", capsys.readouterr().out)

# ------------------------------ Data ------------------------------
def test_augmentations_are_the_assignments_and_independent(monkeypatch):
    flip, move, cut, grey = main.AUGMENT
    chances = {type(transform).__name__: transform.p for transform in main.AUGMENT}
    assert str(chances) == ("{'HorizontalFlip': 0.3, 'ShiftScaleRotate': 0.5, "
                            "'CoarseDropout': 0.1, 'ToGray': 0.1}")
    values = move.get_transform_init_args()
    names = ("shift_limit_x", "shift_limit_y", "scale_limit", "rotate_limit", "border_mode")
    assert [np.max(values[name]) for name in names] == pytest.approx([0.1, 0.1, 0.1, 30, 4])
    for white in np.full((100, 32, 32, 3), 255, np.uint8):
        image = cut(image=white, force_apply=True)["image"]
        hole = np.argwhere((image == (125, 123, 114)).all(axis=2))  # the mean colour
        assert len(hole) == 256 and (np.ptp(hole, axis=0) == 15).all()  # 16x16

    for transform, p in ((move, 0), (cut, 0), (grey, 0.5)):
        monkeypatch.setattr(transform, "p", p)
    images = torch.zeros(4000, 32, 32, 3, dtype=torch.uint8)
    images[:, :, :16, 0] = 200  # the left half is red
    samples = main.AugmentedImages(images, torch.arange(4000), 0).__getitems__(range(4000))
    batch = np.stack([image for image, _ in samples])
    flipped = batch[:, 0, 0, 0] < batch[:, 0, 31, 0]
    greyed = (batch[..., 0] == batch[..., 1]).all((1, 2))
    shares = np.bincount(2 * flipped + greyed) / 4000
    assert shares == pytest.approx([0.35, 0.35, 0.15, 0.15], abs=0.03)

@pytest.mark.parametrize("workers", [0, 2])
def test_order_and_augmentations_follow_the_seed(workers):
    dataset = main.AugmentedImages(IMAGES, torch.arange(50), seed=0)
    loader = torch.utils.data.DataLoader(dataset, 16, shuffle=True, num_workers=workers)
    epochs = []
    for dataset.seed in (1, 2, 1):
        torch.manual_seed(dataset.seed)
        images, labels = [torch.cat(parts) for parts in zip(*loader)]
        assert (images.flatten(1).median(1).values // 5).tolist() == labels.tolist()
        assert sorted(labels.tolist()) == list(range(50))
        flipped = (images[:, 0, 0, 0] > images[:, 0, 31, 0]).tolist()
        assert flipped[:16] != flipped[16:32]  # each batch has augmentations of its own
        epochs.append([labels.tolist(), images[labels.argsort()].tolist()])
    first, second, again = epochs
    assert first == again and first[0] != second[0] and first[1] != second[1]

def test_input_is_normalized():
    x = main.to_input(IMAGES, "cpu")[7].permute(1, 2, 0)
    normalize = main.A.Normalize((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
    assert np.allclose(x, normalize(image=IMAGES[7].numpy())["image"], atol=1e-5)

def load(data):
    sets = main.load_images(Path(data), dry_run=False)
    return [(images[0].tolist(), labels.tolist()) for images, labels in sets]

def test_cifar10_is_found_or_fetched(monkeypatch):
    folder = Path("original", CIFAR10.base_folder)  # of six images
    folder.mkdir(parents=True)
    pixels = IMAGES[:1].permute(0, 3, 1, 2).flatten(1).numpy()
    content = pickle.dumps({"data": pixels, "labels": [3], "label_names": []})
    md5 = hashlib.md5(content).hexdigest()
    names = [f"data_batch_{n}" for n in range(1, 6)]
    for name in [*names, "test_batch", "batches.meta"]:
        (folder / name).write_bytes(content)
    archive = Path(shutil.make_archive("archive", "gztar", "original"))
    monkeypatch.setattr(CIFAR10, "train_list", [(name, md5) for name in names])
    monkeypatch.setattr(CIFAR10, "test_list", [("test_batch", md5)])
    monkeypatch.setitem(CIFAR10.meta, "md5", md5)
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    monkeypatch.setattr(main, "KAGGLE", Path("kaggle input"))
    monkeypatch.setattr(main, "URLS", ["silent source"])
    def download(url, folder, name, md5):
        assert socket.getdefaulttimeout() == 8
        if url == "silent source":
            raise OSError("timed out")
        shutil.copy(archive, folder / name)
    monkeypatch.setattr(utils, "download_url", download)
    Path("data").mkdir()
    Path("data", CIFAR10.filename).write_bytes(archive.read_bytes() + b"evil")
    with pytest.raises(SystemExit, match="No CIFAR-10.*--dry-run"):
        load("data")
    assert os.listdir("data") == [CIFAR10.filename] and socket.getdefaulttimeout() is None
    main.URLS.append("next source")
    expected = [(IMAGES[0].tolist(), n * [3]) for n in (5, 1)]
    assert load("data") == expected
    shutil.copytree("data", "kaggle input/some/data set")
    assert load("nothing here") == expected
    shutil.rmtree("kaggle input")
    Path("links/four/folders").mkdir(parents=True)
    for name, target in {"circle": ".", "another": ".", "four/folders/renamed": folder}.items():
        Path("links", name).symlink_to(Path(target).absolute())
    assert load("links") == expected

# ------------------------------ Optimizer and training ------------------------------
class Calls(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the operators that do any work."""
    count = 0
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not function.is_view
        return function(*args, **(kwargs or {}))

def orthogonal(update):
    """Newton-Schulz iteration of one kernel, neither padded nor transposed."""
    x = update.flatten(1) / update.norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.7750 * gram) @ x
    return x.view_as(update)

@pytest.mark.parametrize("device", ["cpu", GPU])
def test_a_single_step_is_muons_definition(device):
    net = main.Net().to(device, memory_format=torch.channels_last)
    optimizer = main.Muon(net.parameters(), lr=0.02)  # a generator is as good as a list
    net, optimizer = copy.deepcopy((net, optimizer))
    net.convblock2.requires_grad_(False)  # frozen after the optimizer was made
    expected = copy.deepcopy(net).requires_grad_(False)
    averages = [torch.zeros_like(p) for p in expected.parameters()]
    for _ in range(3):
        optimizer.zero_grad()
        net(torch.randn(16, 3, 32, 32, device=device)).square().mean().backward()
        for p, q, average in zip(net.parameters(), expected.parameters(), averages):
            if p.grad is None:
                continue
            if p.ndim == 4 and p.shape[1] > 1:
                average += 0.05 * (p.grad - average)
                q -= 0.02 * (orthogonal(0.05 * p.grad + 0.95 * average) + 0.05 * q)
            else:
                gradient = p.grad + 5e-4 * q
                average.mul_(0.9).add_(gradient)
                q -= 0.1 * (gradient + 0.9 * average)
        with Calls() as calls:
            assert optimizer.step(torch.is_grad_enabled)  # as a closure
        assert calls.count <= 120
        torch.testing.assert_close(list(net.parameters()), list(expected.parameters()))

def test_loss_and_accuracy_are_means_of_all_images(capsys, monkeypatch):
    logits = torch.randn(1500, 10)
    logits[1000:] *= 100  # the last batch is smaller and worse
    labels = torch.arange(1500) % 10
    right = (logits.argmax(1) == labels).double()
    expected = {"loss": nn.functional.cross_entropy(logits, labels).item(),
                "accuracy": 100 * right.mean().item(),
                "by_class": (100 * right.view(150, 10).mean(0)).tolist()}
    monkeypatch.setattr(main, "to_input", lambda images, device: images)
    net = nn.PReLU(init=1)  # changes nothing
    still = torch.optim.SGD(net.parameters(), lr=0)
    batches = list(zip(logits.split(1000), labels.split(1000)))
    torch.testing.assert_close(main.train(net, batches, still, still, "cpu"), expected)
    assert net.training
    torch.testing.assert_close(main.test(net, logits, labels, "cpu"), expected)
    assert not net.training
    means = "Average loss: {loss:.4f}, Accuracy: %d/1500 ({accuracy:.2f}%%)".format(**expected)
    assert capsys.readouterr().out.count(means % right.sum()) == 2

# ------------------------------ Whole runs ------------------------------
@pytest.mark.parametrize("device", ["cpu", GPU])
def test_any_number_of_workers_ends_in_the_same_weights(device, capsys, monkeypatch):
    monkeypatch.setenv("HOME", os.getcwd())
    for workers in (0, 2):  # a batch size that does not divide the 384 images
        dry_run(f"--epochs 3 --batch-size 100 --workers {workers} --device {device} --out=~/{workers}")
    out = capsys.readouterr().out
    assert out.count("Training set") == out.count("/500 ") == 6 and out.count("noise") == 2
    assert "Accuracy of horse :" in out and "Best test accuracy: 1" in out
    assert weights(0) == weights(2)
    pictures = [Path("0/dry-run", name) for name in ("dataset_images.png", "curves.png")]
    assert all(picture.stat().st_size > 4000 for picture in pictures)

def test_killed_run_goes_on_and_ends_in_the_same_weights(capsys):
    killed = "--epochs 3 --seed 4 --resume --workers 2 --out killed"
    command = [sys.executable, main.__file__, "--dry-run", "--batch-size", "64", *killed.split()]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert b"Epoch 2:\n" in process.stdout  # waits for it
        process.kill()
        process.communicate(timeout=60)  # until its workers have ended, too
    for other in ("--lr 9", "--seed 9", "--batch-size 9", "--epochs 9", "--dilated"):
        with pytest.raises(SystemExit, match="its options are.*use another --out"):
            dry_run(f"{killed} {other}")
    capsys.readouterr()
    for options in (killed, killed, "--epochs 3 --seed 4 --workers 0 --out whole"):
        dry_run(options)
    epochs = re.findall(r"Epoch (\d)", capsys.readouterr().out)
    assert epochs == ["2", "3", "1", "2", "3"] and weights("killed") == weights("whole")

@pytest.mark.parametrize("options", [
    "--epochs 0", "--batch-size -1", "--lr -1", "--workers -1", "--seed -1", "--device gpu",
    "--out /dev/null", "--lr 1e18", "--resume"])
def test_bad_input_gets_one_line_and_nothing_is_lost(options, capsys):
    Path("dry-run/checkpoint.pt.tmp").mkdir(parents=True)  # as unfit to write to as a full disk
    Path("dry-run/checkpoint.pt").write_text("precious")
    with pytest.raises(SystemExit) as raised:
        dry_run(f"--workers 0 {options}")
    message = f"{capsys.readouterr().err}{raised.value.code}"
    cause = options.split()[0].replace("resume", "out").replace("--out", "--out|/dev/null")
    assert re.search(rf"^main.py: error: .*({cause})", message, re.MULTILINE)
    assert Path("dry-run/checkpoint.pt").read_text() == "precious"

@pytest.mark.parametrize("kind, message", {
    OSError: "OSError: reason", MemoryError: "reason", KeyboardInterrupt: "--resume",
    torch.OutOfMemoryError: "reason: .*smaller --batch-size",
    torch.AcceleratorError: "reason: .*another GPU.*--device cpu"}.items())
def test_only_what_a_user_can_mend_gets_one_line(kind, message, monkeypatch):
    errors = [RuntimeError("bug"), kind("reason")]
    def fail(*args):
        raise errors.pop()
    monkeypatch.setattr(main, "run", fail)
    with pytest.raises(SystemExit, match=rf"\Amain.py: error: .*{message}.*\Z"):
        main.main([])
    with pytest.raises(RuntimeError, match="bug"):
        main.main([])
