"""Tests of main.py, without GPU, dataset or network. Run: python -m pytest"""
import os, pathlib, pickle, re, shutil, subprocess, sys, textwrap
os.environ["OMP_NUM_THREADS"] = "1"  # More threads only wait for each other here.
import main, numpy as np, pytest, torch
from PIL import Image
from torch.testing import assert_close
from torchvision.datasets import CIFAR10, utils
from unittest.mock import Mock
GPU = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))

@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

def test_shapes_parameters_and_receptive_fields(capsys):
    net = main.Net().eval()
    main.describe(net)
    table = capsys.readouterr().out
    readme = pathlib.Path(main.__file__).with_name("README.md").read_text()
    assert textwrap.indent(table, "    ") in readme
    fields = dict(re.findall(r"(\w+).* (\d+)\n", table))  # of each block's last layer
    for p in net.parameters():
        p.data.fill_(0.1)  # With these weights no contribution cancels another.
    x = image = torch.ones(1, 3, 128, 128, requires_grad=True)
    for name, block in net.named_children():
        x = block(x)
        middle = x.shape[2] // 2
        gradient, = torch.autograd.grad(x[0, 0, middle, middle], image, retain_graph=True)
        assert gradient[0, 0].any(0).sum() == int(fields[name])
    assert net(image).shape == (1, 10)  # although it is larger than 32x32

@pytest.mark.parametrize("device", ["cpu", GPU])
def test_a_single_step_learns_from_its_batch(device):
    net = main.Net().to(device).eval()
    before = [p.clone() for p in net.parameters()]
    optimizer = main.MuonWithSGD(net.parameters())
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, [0.02, 0.1], 10)
    batch = torch.randint(256, (64, 32, 32, 3)).byte(), torch.arange(64) % 10
    first = main.train(net, [batch], optimizer, scheduler, device)
    assert not any(map(torch.equal, net.parameters(), before))
    second = main.train(net, [batch], optimizer, scheduler, device)
    assert second["loss"] < first["loss"]
    assert scheduler.last_epoch == net.convblock1[1].num_batches_tracked == 2

def test_dilated_network_is_the_strided_one_computed_densely():
    strided = main.Net().double().eval()
    dilated = main.Net(dilated=True).double().eval()
    dilated.load_state_dict(strided.state_dict())
    image = torch.randn(1, 3, 32, 32).double()
    few, many = [torch.nn.Sequential(*net)[:-1](image) for net in (strided, dilated)]  # no gap
    assert_close(few, many[:, :, ::4, ::4])
    assert dilated.gap.kernel_size == many.shape[2] == 16

def test_augmentations_are_the_assignments_and_random(monkeypatch):
    flip, move, hole, grey = main.AUGMENT
    assert [flip.p, move.p, hole.p, grey.p] == [0.3, 0.5, 0.1, 0.1]
    assert move.shift_limit_x == move.shift_limit_y == (-0.1, 0.1)
    assert move.scale_limit == (0.9, 1.1)
    assert move.rotate_limit == (-30, 30)
    assert move.border_mode == main.cv2.BORDER_REFLECT_101
    assert hole.num_holes_range == (1, 1)
    assert hole.hole_height_range == hole.hole_width_range == (16, 16)
    assert hole.fill == (125, 123, 114)

    for transform, p in zip(main.AUGMENT, (0.5, 0, 0, 0.5)):
        monkeypatch.setattr(transform, "p", p)
    labels = torch.arange(256)
    images = torch.zeros(256, 32, 32, 3).byte()
    images[:, :, 0, 0] = 200  # The left end is red, the last row tells the label.
    images[:, 31] = labels.view(256, 1, 1)
    dataset = main.AugmentedImages(images, labels)
    seen = []
    for seed, start in ((0, 0), (0, 1), (1, 0)):
        dataset.seed = seed
        samples = dataset.__getitems__(range(start, 256))
        assert all(image[31, 0, 0] == label for image, label in samples)
        flipped_and_grey = [image[0, 31, 1] > 0 for image, _ in samples]
        assert 40 < sum(flipped_and_grey) < 90  # about a quarter
        assert flipped_and_grey[:99] not in seen  # Each batch and seed has its own.
        seen.append(flipped_and_grey[:99])

def test_loss_and_accuracy_are_means_over_all_images():
    labels = torch.arange(1500) % 10
    images = torch.zeros(1500, 32, 32, 3).byte()
    answers = labels + (torch.arange(1500) >= 1000)  # The last 500 are wrong.
    images[range(1500), 0, answers, 0] = 255
    x = main.to_input(images, "cpu")
    assert x[0, :, 0, 0].tolist() == pytest.approx([2.0591, -1.9803, -1.7069], abs=1e-4)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.PReLU(init=1))  # Pixels are the logits.
    loss = torch.nn.functional.cross_entropy(net(x), labels)
    optimizer = Mock()
    batches = zip(images.split(1000), labels.split(1000))
    for result in (main.train(net, batches, optimizer, Mock(), "cpu"),
                   main.test(net, images, labels, "cpu")):
        assert result["loss"] == pytest.approx(loss.item())
        assert [result["accuracy"], *result["by_class"]] == pytest.approx(11 * [100 / 1.5])
    assert optimizer.zero_grad.call_count == 2 and not net.training

def orthogonal(update):  # Newton-Schulz's iteration for one kernel, not padded or transposed
    x = update.flatten(1) / update.norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
    return x.view_as(update)

def test_muon_is_its_definition_and_sgd_takes_the_rest():
    shapes = (8, 3, 3, 3), (16, 4, 1, 1), (40, 2, 3, 3), (4, 4, 3, 3), (6, 1, 3, 3), (5,)
    *kernels, frozen, depthwise, bias = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    optimizer = main.MuonWithSGD([depthwise, bias, frozen, *kernels], lr=0.3)
    sgd = {"params": [depthwise, bias], "lr": 0.1, "momentum": 0.9, "nesterov": True,
           "weight_decay": 5e-4}
    assert optimizer.param_groups[1].items() >= sgd.items()
    expected = [kernel.detach().clone() for kernel in kernels]
    averages = [0, 0, 0]
    for _ in range(3):
        for n, kernel in enumerate(kernels):
            kernel.grad = torch.randn_like(kernel)
            averages[n] = 0.95 * averages[n] + 0.05 * kernel.grad
            update = orthogonal(0.95 * averages[n] + 0.05 * kernel.grad)
            expected[n] -= 0.3 * (update + 0.05 * expected[n])
        optimizer.step()
    assert_close(kernels, expected)

@pytest.mark.parametrize("device", ["cpu", GPU])
def test_killed_run_goes_on_and_ends_in_the_weights_of_a_whole_one(device, monkeypatch):
    run = f"--dry-run --epochs 3 --batch-size 100 --seed 4 --device {device} --out"
    command = [sys.executable, main.__file__, *f"{run} killed --workers 2".split()]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert b"Epoch 2:\n" in process.stdout  # This waits for it.
        process.kill()
    monkeypatch.setattr(main, "train", Mock(wraps=main.train))
    main.main(f"{run} killed --workers 0 --resume".split())
    assert main.train.call_count < 3  # It did not begin anew.
    main.main(f"{run} whole --workers 0".split())
    _, loader, _, scheduler, _ = main.train.call_args.args  # of the last epoch
    assert loader.dataset.seed == 4003 and scheduler.total_steps == 12
    assert isinstance(loader.sampler, torch.utils.data.RandomSampler)
    assert {"curves.png", "dataset_images.png"} < set(os.listdir("whole/dry-run"))
    killed, whole = [torch.load(f"{out}/dry-run/checkpoint.pt") for out in ("killed", "whole")]
    assert_close(killed["model"], whole["model"], rtol=0, atol=0)

@pytest.mark.parametrize("options, reason", [
    ("--epochs 0", "above 0"), ("--lr nan", "above 0"), ("--dry", "unrecognized"),
    ("--out /dev/null", "/dev/null"), ("--resume", "another --out"), ("", ".tmp")])
def test_bad_input_is_explained_and_nothing_is_lost(options, reason, capsys):
    os.makedirs("dry-run/checkpoint.tmp")  # so that no checkpoint can be written
    torch.save({"settings": "precious"}, "dry-run/checkpoint.pt")
    with pytest.raises(SystemExit) as raised:
        main.main(f"--dry-run --workers 0 {options}".split())
    line = f"{capsys.readouterr().err}{raised.value}"
    assert re.search(f"main.py: error: .*{reason}", line)
    assert torch.load("dry-run/checkpoint.pt")["settings"] == "precious"

def test_curves_have_lines_and_stay_in_their_frame():
    row = {"train": {"loss": 1e9, "accuracy": 50}, "test": {"loss": np.nan, "accuracy": 0}}
    main.draw_curves([row, row], "curves.png")
    picture = Image.open("curves.png")
    pixels = [picture.getpixel(xy) for xy in ((310, 40), (910, 200), (1160, 362), (310, 30))]
    assert pixels == [(255, 0, 0), (0, 0, 255), (255, 0, 0), (255, 255, 255)]

def test_cifar10_comes_from_the_mirror_and_is_checked(monkeypatch):
    os.mkdir(CIFAR10.base_folder)
    content = pickle.dumps({"data": [3072 * [7]], "labels": [3], "label_names": []})
    for name, _ in [*CIFAR10.train_list, *CIFAR10.test_list, ("batches.meta", "")]:
        pathlib.Path(CIFAR10.base_folder, name).write_bytes(content)
    archive = shutil.make_archive("archive", "gztar", ".", CIFAR10.base_folder)
    fetch = Mock(side_effect=lambda url, path: shutil.copy(archive, path))
    monkeypatch.setattr(utils, "_get_redirect_url", lambda url, max_hops: url)
    monkeypatch.setattr(utils, "_urlretrieve", fetch)
    monkeypatch.setattr(utils, "check_md5", Mock(return_value=False))
    with pytest.raises(SystemExit, match="No CIFAR-10"):
        main.load_images("data")
    assert [call.args[0] for call in fetch.mock_calls] == [main.Mirror.url, CIFAR10.url]
    assert os.listdir("data") == [CIFAR10.filename]  # It is not unpacked.
    utils.check_md5.return_value = True
    _, (images, labels) = main.load_images("data")
    assert images.shape == (1, 32, 32, 3) and labels == torch.tensor([3])
