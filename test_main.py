"""Tests of main.py: a minute on a CPU, without GPU, dataset or network. Run: python -m pytest"""
import copy, os, pickle, re, shutil, socket, subprocess, sys
from pathlib import Path
from unittest.mock import Mock
os.environ["OMP_NUM_THREADS"] = "1"  # more threads only wait for each other here
import main, numpy as np, pytest, torch, torchvision
from torchvision.datasets import CIFAR10, utils
GPU = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))
IMAGES = torch.arange(1, 251, 5).byte().view(50, 1, 1, 1).repeat(1, 32, 32, 3)
IMAGES[:, :, 16:] += 2  # a number can be read from each image, and whether it is flipped

@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

def dry_run(options):
    main.main(f"--dry-run --batch-size 64 --device cpu {options}".split())

def test_shapes_parameters_and_receptive_fields(capsys):
    net = main.Net()
    net.convblock1.requires_grad_(False)
    main.describe(net)
    out = capsys.readouterr().out.replace("-1, ", "").replace(",", "")
    layers = re.findall(r"\w+-\d+ .*\] +(\d+) +\d+", out)
    assert len(layers) == 41 and sum(map(int, layers)) == 86816
    assert re.findall(r"params: (\d+)", out) == ["86816", "76608", "10208"]
    assert "Size (MB): 3.72\n38.60 MFLOPs 19.30 MMACs 20.03 MDMAs" in out
    blocks = re.findall(r"(?:block\d|Avg\S+) +(\[.*\]) +(\d+) +(\d+)", out)
    shapes, params, fields = [" ".join(column) for column in zip(*blocks)]
    assert params == "10208 9280 18560 4864 13312 18496 12096 0"
    assert shapes == "[32 32 32] [32 16 16] [64 16 16] [64 8 8] [32 8 8] [32 4 4] [10 4 4] [10 1 1]"
    for p in net.parameters():
        p.data.fill_(0.1)
    x = image = torch.ones(1, 3, 128, 128, requires_grad=True)
    reached = []  # with these weights no contribution cancels another
    for block in net.children():
        x = block(x)
        middle = x.shape[2] // 2
        gradient, = torch.autograd.grad(x[0, 0, middle, middle], image, retain_graph=True)
        reached.append(str(gradient.sum((0, 1, 3)).count_nonzero().item()))
    assert fields.split() == reached == "5 7 11 15 23 55 71 83".split()
    main.describe(torchvision.models.resnet18())  # its blocks are no chain of layers
    assert re.search(r"(?s)BasicBlock-66 .*ResNet .*\]11,689,512 .*Trainable params: 11,689,512\n",
                     capsys.readouterr().out)

def test_dilated_network_is_the_same_computed_densely():
    strided, dilated = main.Net().double(), main.Net(dilated=True).double()
    x = torch.randn(16, 3, 32, 32).double()
    strided(x)  # so that the running means are not all 0
    dilated.load_state_dict(strided.state_dict())
    few, many = [torch.nn.Sequential(*net.eval().children())[:-1](x) for net in (strided, dilated)]
    assert few.std() > 1e-4 and many.shape == (16, 10, 16, 16)  # 32 - 2 * 8: no stride
    assert torch.allclose(few, many[:, :, ::4, ::4], rtol=0, atol=1e-12)
    assert torch.allclose(dilated(x), many.mean((2, 3)), rtol=0, atol=1e-12)

def test_augmentations_are_the_assignments_and_independent(monkeypatch):
    text = " ".join(str(transform) for transform in main.AUGMENT)
    for part in ("HorizontalFlip(p=0.3) ShiftScaleRotate(p=0.5, shift_limit_x=(-0.1, 0.1), shift",
                 "_limit_y=(-0.1, 0.1), scale_limit=(-0.0999", "rotate_limit=(-30.0, 30.0), ",
                 "border_mode=4", ") CoarseDropout(p=0.1, fill=(125.0, 123.0, 114.0), ",
                 "range=(16, 16), hole_width_range=(16, 16), num_holes_range=(1, 1)) ToGray(p=0.1"):
        assert part in text
    for transform, p in zip(main.AUGMENT, (0.3, 0, 0, 0.5)):
        monkeypatch.setattr(transform, "p", p)
    red = torch.zeros(4000, 32, 32, 3, dtype=torch.uint8)
    red[:, :, :16, 0] = 200  # the left half
    samples = main.AugmentedImages(red, torch.arange(4000), 0).__getitems__(range(4000))
    flipped = np.array([image[0, 0, 0] < image[0, 31, 0] for image, _ in samples])
    grey = np.array([(image[..., 0] == image[..., 1]).all() for image, _ in samples])
    assert np.bincount(2 * flipped + grey) == pytest.approx([1400, 1400, 600, 600], abs=120)

def test_batches_follow_the_seed_and_are_normalized():
    dataset = main.AugmentedImages(IMAGES, torch.arange(50), seed=0)
    loader = torch.utils.data.DataLoader(dataset, 16, shuffle=True)
    epochs = []
    for dataset.seed in (1, 2, 1):
        torch.manual_seed(dataset.seed)
        images, labels = [torch.cat(parts) for parts in zip(*loader)]
        assert torch.equal(images.flatten(1).median(1).values // 5, labels.byte())
        flipped = (images[:, 0, 0, 0] > images[:, 0, 31, 0]).tolist()
        assert flipped[:16] != flipped[16:32]  # each batch has augmentations of its own
        samples = [image.tolist() for image, _ in dataset.__getitems__(range(50))]
        epochs.append([labels.tolist(), images.tolist(), samples])
    first, other, again = epochs
    assert first == again and first[0] != other[0] and first[2] != other[2]
    assert sorted(first[0]) == list(range(50))
    pixel = main.to_input(IMAGES, "cpu")[47, :, 0, 31]  # of 238 thrice
    assert pixel.tolist() == pytest.approx([1.789204, 1.852704, 1.860984], rel=1e-5)

def load(data):
    sets = main.load_images(Path(data), dry_run=False)
    return [(images.shape, labels.tolist()) for images, labels in sets]

def test_cifar10_is_found_or_fetched(monkeypatch):
    folder = Path("original", CIFAR10.base_folder)  # of six images
    folder.mkdir(parents=True)
    content = {"data": np.zeros((1, 3072), "uint8"), "labels": [3], "label_names": []}
    for name, _ in [*CIFAR10.train_list, *CIFAR10.test_list, ("batches.meta", "")]:
        (folder / name).write_bytes(pickle.dumps(content))
    archive = Path(shutil.make_archive("far/down/cifar-10-python", "gztar", "original"))
    def check(path, md5):
        return (Path(path).read_bytes() == archive.read_bytes()) == (md5 == CIFAR10.tgz_md5)
    def download(url, folder, name, md5):
        assert socket.getdefaulttimeout() == 8
        shutil.copy(url, Path("data", name))
    monkeypatch.setattr(utils, "check_md5", check)
    monkeypatch.setattr(utils, "download_url", download)
    monkeypatch.setattr(main, "KAGGLE", Path("data/kaggle"))
    monkeypatch.setattr(main, "URLS", ["missing source"])
    main.KAGGLE.mkdir(parents=True)
    Path("data", CIFAR10.filename).write_bytes(archive.read_bytes() + b"evil")
    with pytest.raises(SystemExit, match="No CIFAR-10.*--dry-run"):
        load("data")
    assert sorted(os.listdir("data")) == [CIFAR10.filename, "kaggle"]  # nothing unpacked
    main.URLS.append(archive)
    assert load("data") == load("far") and socket.getdefaulttimeout() is None
    for link, to in {"a": ".", "b": ".", "renamed": Path("../..", folder)}.items():
        (main.KAGGLE / link).symlink_to(to)
    assert load("nothing here") == [((n, 32, 32, 3), n * [3]) for n in (5, 1)]

class Calls(torch.utils._python_dispatch.TorchDispatchMode):
    count = 0  # of operators that do any work
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not function.is_view
        return function(*args, **(kwargs or {}))

def orthogonal(update):  # one kernel's, neither padded nor transposed
    x = update.flatten(1) / update.norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
    return x.view_as(update)

@pytest.mark.parametrize("device", ["cpu", GPU])
def test_a_single_step_is_muons_definition(device):
    net = main.Net().to(memory_format=torch.channels_last)
    net.tall = torch.nn.Conv2d(10, 200, 3, padding=1)  # a matrix higher than wide
    net, optimizer = copy.deepcopy((net, main.Muon(net.to(device).parameters(), lr=0.02)))
    net.convblock2.requires_grad_(False)  # frozen after the optimizer was made
    expected = copy.deepcopy(net).requires_grad_(False)
    averages = [torch.zeros_like(p) for p in expected.parameters()]
    for _ in range(3):
        optimizer.zero_grad()
        net(torch.randn(16, 3, 32, 32, device=device)).square().mean().backward()
        for p, q, average in zip(net.parameters(), expected.parameters(), averages):
            if p.grad is not None and p.ndim == 4 and p.shape[1] > 1:
                average += 0.05 * (p.grad - average)
                q -= 0.02 * (orthogonal(0.05 * p.grad + 0.95 * average) + 0.05 * q)
            elif p.grad is not None:
                gradient = p.grad + 5e-4 * q
                average.mul_(0.9).add_(gradient)
                q -= 0.1 * (gradient + 0.9 * average)
        with Calls() as calls:
            assert optimizer.step(torch.is_grad_enabled)  # as a closure
        assert calls.count <= 120
        torch.testing.assert_close(list(net.parameters()), list(expected.parameters()))

def test_loss_and_accuracy_are_means_of_all_images(capsys, monkeypatch):
    labels = torch.arange(1500) % 10
    logits = 100.0 * torch.nn.functional.one_hot(labels)
    logits[1000:] = 0  # the last batch is smaller and worse: a loss of log(10), right for label 0
    expected = {"loss": 0.7675284, "accuracy": 70.0, "by_class": [100.0] + 9 * [200 / 3]}
    monkeypatch.setattr(main, "to_input", lambda images, device: images)
    net = torch.nn.PReLU(init=1).eval()  # changes nothing; train switches its mode
    still = Mock(**{"zero_grad.side_effect": net.zero_grad})  # optimizer, scheduler: no steps
    batches = zip(logits.split(1000), labels.split(1000))
    results = [main.train(net, batches, still, still, "cpu"), net.training,
               main.test(net, logits, labels, "cpu"), net.training, net.weight.grad is not None]
    torch.testing.assert_close(results, [expected, True, expected, False, True], rtol=1e-5, atol=0)
    assert [name for name, _, _ in still.mock_calls] == 2 * ["zero_grad", "step", "step"]
    assert capsys.readouterr().out.count("loss: 0.7675, Accuracy: 1050/1500 (70.00%)\n") == 2

@pytest.mark.parametrize("device", ["cpu", GPU])
def test_killed_run_goes_on_and_ends_in_the_weights_of_a_whole_one(device, capsys, monkeypatch):
    monkeypatch.setenv("HOME", os.getcwd())
    run = f"--epochs 3 --seed 4 --batch-size 100 --device {device} --workers "  # of 384 images
    killed = f"{run} 2 --resume --out=~/killed"
    command = [sys.executable, main.__file__, "--dry-run", *killed.split()]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert b"Epoch 2:\n" in process.stdout  # waits for it
        process.kill()
        process.communicate(timeout=60)  # until its workers have ended, too
    for other in ("--lr 9", "--seed 9", "--batch-size 9", "--epochs 9", "--dilated"):
        with pytest.raises(SystemExit, match="its options are.*use another --out"):
            dry_run(f"{killed} {other}")
    dry_run(killed)
    assert re.search(r"(?s)MDMAs\n\nEpoch 2:.*/500 .*horse.*Best test", capsys.readouterr().out)
    monkeypatch.setattr(main, "train", Mock(wraps=main.train))
    monkeypatch.setattr(torch, "manual_seed", Mock(wraps=torch.manual_seed))
    monkeypatch.setattr(main, "IN_NOTEBOOK", True)
    monkeypatch.setattr(main, "display", Mock(), raising=False)
    dry_run(f"{run} 0 --out=whole")
    _, loader, optimizer, scheduler, _ = main.train.call_args.args
    assert scheduler.total_steps == 12 and "RandomSampler" in str(loader.sampler)
    assert re.findall(r"(?:max_lr|momentum): (\S+)", str(optimizer)) == ["0.02", "0", "0.1", "0.9"]
    assert str(torch.manual_seed.mock_calls) == "[call(4), call(4001), call(4002), call(4003)]"
    parts = [torch.load(f"{out}/dry-run/checkpoint.pt")["model"] for out in ("killed", "whole")]
    torch.testing.assert_close(*parts, rtol=0, atol=0)
    assert len(main.display.call_args.args) == 2

@pytest.mark.parametrize("options", [
    "--epochs 0", "--batch-size -1", "--lr -1", "--workers -1", "--seed -1", "--device gpu",
    "--lr 1e18", "--out /dev/null", "--resume --dilated", "--epochs 1"])
def test_bad_input_gets_one_line_and_nothing_is_lost(options, capsys):
    Path("dry-run", "checkpoint.tmp" if "--epochs 1" in options else "").mkdir(parents=True)
    Path("dry-run/checkpoint.pt").write_text("precious")
    with pytest.raises(SystemExit) as raised:
        dry_run(f"--workers 0 {options}")
    out, err = capsys.readouterr()
    assert re.search("(?m)^main.py: error: .*(--|/dev/null|.tmp)", f"{err}{raised.value.code}")
    assert Path("dry-run/checkpoint.pt").read_text() == "precious"
    assert ("[-1, 10, 16, 16]" in out) == ("--dilated" in options)

def test_only_what_a_user_can_mend_gets_one_line(monkeypatch):
    for kind in (OSError, MemoryError, torch.OutOfMemoryError, torch.AcceleratorError,
                 KeyboardInterrupt, RuntimeError):
        monkeypatch.setattr(main, "run", Mock(side_effect=kind("reason\nmore")))
        with pytest.raises((SystemExit, RuntimeError)) as raised:
            main.main()
        assert ("\n" in str(raised.value)) == (kind is RuntimeError)
