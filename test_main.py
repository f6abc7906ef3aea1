"""Tests of main.py, without GPU, dataset or network. Run: python -m pytest"""
import copy, os, pathlib, re, subprocess, sys
import albumentations as A, cv2, main, pytest, torch
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
        p.data.fill_(0.1)  # With these weights no contribution cancels another.
    image = torch.ones(1, 3, 128, 128, requires_grad=True)
    values = Sequential(*net)(image)  # (1, 10, 7, 7), not the mean that Net returns
    values[0, 0, 3, 3].backward()
    width = image.grad[0, 0].any(0).sum()
    assert f" {width}\nTotal" in table  # at the end of gap's row

@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_single_step_learns_from_its_batch(device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    net = main.Net().to(device)
    before = copy.deepcopy(net).parameters()
    optimizer = main.MuonWithSGD(net.parameters())
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
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
    assert_close(strided(image), values[:, :, ::4, ::4].mean((2, 3)))

def test_augmentations_have_the_assignments_values():
    expected = [{"p": 0.3},
                {"p": 0.5, "shift_limit_x": (-0.1, 0.1), "shift_limit_y": (-0.1, 0.1),
                 "scale_limit": (0.9, 1.1), "rotate_limit": (-30, 30),
                 "border_mode": cv2.BORDER_REFLECT_101},
                {"p": 0.1, "num_holes_range": (1, 1), "hole_height_range": (16, 16),
                 "hole_width_range": (16, 16), "fill": (125, 123, 114)},
                {"p": 0.1}]
    for transform, values in zip(main.AUGMENT, expected, strict=True):
        assert vars(transform).items() >= values.items()
    white = main.to_input(torch.full((1, 1, 1, 3), 255), "cpu")
    assert white.flatten().tolist() == pytest.approx([2.0591, 2.1265, 2.1158], abs=1e-4)

def test_augmentations_are_random_and_keep_labels(monkeypatch):
    flips = [A.HorizontalFlip(p=0.5), A.VerticalFlip(p=0.5)]
    monkeypatch.setattr(main, "AUGMENT", A.Compose(flips))
    labels = torch.arange(256)
    images = torch.zeros(256, 2, 2, 3)
    images[:, 0, 0, 0] = labels
    dataset = main.AugmentedImages(images, labels)
    seen = []
    for seed, start in ((0, 1), (0, 2), (1, 1)):
        dataset.seed = seed
        batch = dataset.__getitems__(range(start, start + 200))
        assert all(image.sum() == label for image, label in batch)
        flipped_twice = [image[1, 1].any() for image, _ in batch]
        assert 30 < sum(flipped_twice) < 70  # about a quarter
        assert flipped_twice not in seen  # Each batch and each seed has its own.
        seen.append(flipped_twice)

def test_loss_and_accuracy_are_means_over_all_images(monkeypatch):
    monkeypatch.setattr(main, "AUGMENT", None)  # Nothing is augmented here.
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
    sizes = shape, (50, 60, 1, 1), (4, 4, 3, 3), (6, 1, 3, 3), (5,)
    kernel, larger, frozen, depthwise, bias = [Parameter(torch.randn(size)) for size in sizes]
    optimizer = main.MuonWithSGD([depthwise, bias, frozen, kernel, larger], lr=0.3)
    sgd = {"params": [depthwise, bias], "lr": 0.1, "momentum": 0.9, "nesterov": True,
           "weight_decay": 5e-4}
    assert optimizer.param_groups[1].items() >= sgd.items()

    larger.grad = torch.randn_like(larger)
    expected = kernel.data.clone()
    average = 0
    for _ in range(3):
        kernel.grad = torch.randn_like(kernel)
        average = 0.95 * average + kernel.grad
        update = 0.95 * average + kernel.grad
        u, s, v = torch.linalg.svd(update.flatten(1) / update.norm(), full_matrices=False)
        for _ in range(5):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        expected -= 0.3 * (0.05 * expected + (u * s @ v).view(shape))
        optimizer.step()
    assert_close(kernel, expected)

def test_killed_run_goes_on_and_ends_in_the_weights_of_a_whole_one(monkeypatch):
    run = "--dry-run --epochs 3 --batch-size 100 --seed 4 --out"
    command = [sys.executable, main.__file__, *f"{run} killed --workers 2".split()]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert b"Epoch 2:\n" in process.stdout  # This waits for it.
        process.kill()
    monkeypatch.setattr(main, "train", Mock(wraps=main.train))
    main.main(f"{run} killed --workers 0 --resume".split())
    assert main.train.call_count < 3  # It did not begin anew.
    main.main(f"{run} whole --workers 0".split())
    whole, loader, _, scheduler, _ = main.train.call_args.args  # of the last epoch
    assert loader.dataset.seed == 4003 and "RandomSampler" in str(loader.sampler)
    assert scheduler.last_epoch == scheduler.total_steps == 12
    killed = torch.load("killed/dry-run/checkpoint.pt")
    assert_close(killed["model"], whole.state_dict(), rtol=0, atol=0)

@pytest.mark.parametrize("options, reason", [
    ("--epochs 0", "above"), ("--dry", "unrecognized"), ("--resume", "another"), ("", ".tmp")])
def test_bad_input_is_explained_and_nothing_is_lost(options, reason, capsys):
    os.makedirs("dry-run/checkpoint.tmp")  # so that no checkpoint can be written
    torch.save({"settings": "precious"}, "dry-run/checkpoint.pt")
    with pytest.raises(SystemExit) as raised:
        main.main(f"--dry-run --workers 0 {options}".split())
    line = f"{capsys.readouterr().err}{raised.value}"
    assert re.search(f"main.py: error: .*{reason}", line)
    assert torch.load("dry-run/checkpoint.pt")["settings"] == "precious"

def test_cifar10_comes_from_the_mirror_and_is_checked(monkeypatch):
    fetch = Mock(side_effect=OSError)
    monkeypatch.setattr("urllib.request.urlopen", fetch)
    pathlib.Path("cifar-10-python.tar.gz").write_text("no archive: unpacking it would be an error")
    with pytest.raises(SystemExit, match="No CIFAR-10"):
        main.load_images(".")
    urls = [call.args[0].host for call in fetch.mock_calls]
    assert urls == ["zenodo.org", "www.cs.toronto.edu"]
