"""Tests of main.py, without GPU, dataset or network. Run: python -m pytest"""
import copy, os, pathlib, re, subprocess, sys
import main, albumentations as A, cv2, pytest, torch  # main first: then nothing asks PyPI
from torch.nn import Flatten, Linear, Parameter, Sequential
from torch.testing import assert_close
from unittest.mock import Mock

@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

def test_shapes_parameters_and_receptive_field(capsys):
    net = main.Net()
    main.describe(net)
    table = capsys.readouterr().out
    assert table in pathlib.Path(main.__file__).with_name("README.md").read_text()
    for p in net.parameters():
        p.data.fill_(0.1)  # With these weights, in eval mode, no contribution cancels another.
    image = torch.ones(1, 3, 128, 128, requires_grad=True)
    values = Sequential(*net)(image)  # (1, 10, 7, 7), not the mean that Net returns
    values[0, 0, 3, 3].backward()
    width = image.grad[0, 0].any(0).sum()  # of the columns that have a gradient
    assert f" {width}\nTotal" in table  # at the end of gap's row

@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_single_step_learns_from_its_batch(device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    net = main.Net().to(device)
    before = copy.deepcopy(net).parameters()
    optimizer = main.MuonWithSGD(net.parameters())
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, 1)
    batch = torch.randint(256, (64, 32, 32, 3)), torch.arange(64) % 10
    first = main.train(net, [batch], optimizer, scheduler, device)
    assert not any(map(torch.equal, net.parameters(), before))
    second = main.train(net, [batch], optimizer, scheduler, device)
    assert second["loss"] < first["loss"]

def test_dilated_network_is_the_strided_one_computed_densely():
    strided = main.Net().eval()
    dilated = main.Net(dilated=True).eval()
    dilated.load_state_dict(strided.state_dict())
    image = torch.randn(1, 3, 32, 32)
    values = Sequential(*dilated)[:-1](image)  # all but the pooling
    assert_close(strided(image), values[..., ::4, ::4].mean((2, 3)))

def test_augmentations_have_the_assignments_values():
    expected = [{"p": 0.3},
                {"p": 0.5, "shift_limit_x": (-0.1, 0.1), "shift_limit_y": (-0.1, 0.1),
                 "scale_limit": (0.9, 1.1), "rotate_limit": (-30, 30),
                 "border_mode": cv2.BORDER_REFLECT_101},
                {"p": 0.1, "num_holes_range": (1, 1), "hole_height_range": (16, 16),
                 "hole_width_range": (16, 16), "fill": (125, 123, 114)},
                {"p": 0.1}]
    assert re.search(r"(?s)Horiz.*ShiftS.*Coarse.*ToGray.*], p=1.0", str(main.AUGMENT))
    for transform, values in zip(main.AUGMENT, expected, strict=True):
        assert vars(transform).items() >= values.items()
    x = main.to_input(torch.arange(200, 212).view(1, 2, 2, 3), "cpu")  # lower left: 206, 207, 208
    assert x[0, :, 1, 0].tolist() == pytest.approx([1.2811, 1.3534, 1.4112], abs=1e-4)

def test_augmentations_are_random_and_keep_labels(monkeypatch):
    monkeypatch.setattr(
        main, "AUGMENT", A.Compose([A.HorizontalFlip(p=0.5), A.VerticalFlip(p=0.5)]))
    labels = torch.arange(256)
    images = torch.zeros(256, 2, 2, 3)
    images[:, 0, 0, 0] = labels
    dataset = main.AugmentedImages(images, labels)
    seen = []
    for seed, first in ((0, 200), (0, 201), (1, 200)):
        dataset.seed = seed
        batch = dataset.__getitems__([first, *range(200)])
        assert all(image.sum() == label for image, label in batch)
        flipped_twice = [image[1, 1].any() for image, _ in batch]
        assert 30 < sum(flipped_twice) < 70  # about a quarter
        assert flipped_twice not in seen  # Each batch and each seed has its own.
        seen.append(flipped_twice)

def test_loss_and_accuracy_are_means_over_all_images(monkeypatch):
    monkeypatch.setattr(main, "AUGMENT", None)  # To augment here would be an error.
    net = Sequential(Flatten(), Linear(12, 10, bias=False)).eval()
    net[1].weight.data.zero_()  # All its logits are 0, and the first class is its answer.
    images = torch.zeros(1500, 2, 2, 3)
    labels = torch.arange(1500) // 150
    batches = zip(images.split(1000), labels.split(1000))
    optimizer = Mock()
    trained = main.train(net, batches, optimizer, Mock(), "cpu")
    assert net.training and optimizer.zero_grad.called
    tested = main.test(net, images, labels, "cpu")
    assert not net.training
    assert trained == tested == {"loss": pytest.approx(2.302585),  # ln 10
                                 "accuracy": 10, "by_class": [100] + 9 * [0]}

@pytest.mark.parametrize("shape", [(8, 3, 3, 3), (16, 4, 1, 1), (40, 2, 3, 3)])
def test_muon_is_its_definition_and_sgd_takes_the_rest(shape):
    sizes = shape, (50, 60, 1, 1), (4, 4, 3, 3), (6, 1, 3, 3), 5
    kernel, larger, frozen, depthwise, bias = [Parameter(torch.randn(size)) for size in sizes]
    optimizer = main.MuonWithSGD([depthwise, bias, frozen, kernel, larger], lr=0.3)
    assert optimizer.param_groups[1]["params"] == [depthwise, bias]

    larger.grad = torch.randn_like(larger)  # Muon pads kernel to it; frozen has no gradient.
    expected = kernel.data.clone()
    average = 0
    for _ in range(3):
        kernel.grad = torch.randn_like(kernel)
        average = 0.95 * average + kernel.grad  # It is 20 times main's, which the norm undoes.
        update = 0.95 * average + kernel.grad
        u, s, vt = torch.linalg.svd(update.flatten(1) / update.norm(), full_matrices=False)
        for _ in range(5):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        expected -= 0.3 * (0.05 * expected + ((u * s) @ vt).view(shape))
        optimizer.step()
    assert_close(kernel, expected)

def test_killed_run_goes_on_and_ends_in_the_weights_of_a_whole_one(monkeypatch):
    run = "--dry-run --epochs 3 --batch-size 100 --lr 0.03 --seed 4 --out"
    command = [sys.executable, main.__file__, *f"{run} killed --workers 2".split()]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert b"Epoch 2:\n" in process.stdout  # This waits for it.
        process.kill()
    monkeypatch.setattr(main, "train", Mock(wraps=main.train))
    main.main(f"{run} killed --workers 0 --resume".split())
    assert main.train.call_count < 3  # It did not begin anew.
    main.main(f"{run} whole --workers 0".split())

    net, loader, _, scheduler, _ = main.train.call_args.args  # of the last epoch
    assert loader.dataset.seed == 4003 and "RandomSampler" in str(loader.sampler)
    assert scheduler.last_epoch == scheduler.total_steps and torch.backends.cudnn.deterministic
    killed = torch.load("killed/dry-run/checkpoint.pt")  # --resume compares its settings.
    assert_close(killed["model"], net.state_dict(), rtol=0, atol=0)
    assert re.search(r"3, 100, 4, False, 0.95, .*max_lr: 0.03\D.*max_lr: 0.1\D.*momentum: 0.9\D"
                     r".*nesterov: True.*weight_decay: 0.0005\D", str(killed["settings"]))

@pytest.mark.parametrize("options, reason", [
    ("--epochs 0", "above"), ("--dry", "unrecognized"), ("--resume", "another --out"),
    ("", ".tmp.*Test set: .*/500 ")])  # An epoch runs before and tests on 500 images.
def test_bad_input_is_explained_and_nothing_is_lost(options, reason, capsys):
    os.makedirs("dry-run/checkpoint.tmp")  # so that no checkpoint can be written
    torch.save({"settings": "precious"}, "dry-run/checkpoint.pt")
    with pytest.raises(SystemExit) as raised:
        main.main(f"--dry-run --workers 0 {options}".split())
    said = f"{raised.value}{capsys.readouterr()}"
    assert re.search(f"main.py: error: .*{reason}", said)
    assert torch.load("dry-run/checkpoint.pt")["settings"] == "precious"

def test_cifar10_comes_from_the_mirror_and_is_checked(monkeypatch, capsys):
    monkeypatch.setattr("urllib.request.urlopen", Mock(side_effect=OSError("offline")))
    pathlib.Path("cifar-10-python.tar.gz").write_text("no archive: unpacking it would be an error")
    with pytest.raises(SystemExit, match="No CIFAR-10"):
        main.load_images(".")
    assert re.search("zenodo.org.*offline\n.*toronto.edu.*offline", capsys.readouterr().out)
