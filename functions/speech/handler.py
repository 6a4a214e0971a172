"""Where somebody speaks: a WAV file in (mono, 16 bit, 16 kHz), spans of speech in seconds out.

The network is Silero VAD's, written out in torch, with the weights that the package silero-vad carries.
"""

import io
import wave
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch.nn.functional import pad

WEIGHTS = Path(find_spec("silero_vad").submodule_search_locations[0], "data", "silero_vad_16k.safetensors")
RATE, WINDOW, CONTEXT = 16000, 512, 64  # hertz, samples, samples
THRESHOLD, PAUSE = 0.5, 8  # probability of speech, windows without it that end a span


class VoiceDetector(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.stft_conv = torch.nn.Conv1d(1, 258, 256, stride=128, bias=False)
        self.conv1 = torch.nn.Conv1d(129, 128, 3, padding=1)
        self.conv2 = torch.nn.Conv1d(128, 64, 3, padding=1, stride=2)
        self.conv3 = torch.nn.Conv1d(64, 64, 3, padding=1, stride=2)
        self.conv4 = torch.nn.Conv1d(64, 128, 3, padding=1)
        self.lstm = torch.nn.LSTM(128, 128)
        self.final_conv = torch.nn.Conv1d(128, 1, 1)

    def forward(self, samples):
        """Probabilities of speech, [windows] float32, of samples, [n] float32 from -1 to 1."""
        windows = pad(samples, (CONTEXT, -len(samples) % WINDOW)).unfold(0, CONTEXT + WINDOW, WINDOW)
        waves = self.stft_conv(pad(windows, (0, 64), mode="reflect")[:, None])
        x = (waves[:, :129] ** 2 + waves[:, 129:] ** 2).sqrt()
        for layer in (self.conv1, self.conv2, self.conv3, self.conv4):
            x = layer(x).relu()
        x, _ = self.lstm(x[:, :, 0])
        return self.final_conv(x.relu()[:, :, None]).sigmoid().flatten()


def load(device):
    weights = {name.replace("lstm_cell", "lstm"): tensor for name, tensor in load_file(WEIGHTS).items()}
    model = VoiceDetector()
    model.load_state_dict({name + "_l0" * name.startswith("lstm."): tensor for name, tensor in weights.items()})
    return model.to(device).eval()


def handle(event, context):
    try:
        samples = read_wav(event.body)
    except (wave.Error, EOFError, ValueError) as error:
        return {"statusCode": 400, "body": {"error": f"Send a WAV file, mono, 16 bit, {RATE} Hz: {error!r}."}}
    with torch.inference_mode():
        device = next(context.model.parameters()).device
        probabilities = context.model(samples.to(device)).tolist()
    return {"statusCode": 200, "body": {"seconds": len(samples) / RATE, "speech": spans(probabilities)}}


def read_wav(body):
    with wave.open(io.BytesIO(body)) as file:
        if (file.getnchannels(), file.getsampwidth(), file.getframerate()) != (1, 2, RATE) or not file.getnframes():
            raise ValueError("it is of another kind, or empty")
        frames = file.readframes(file.getnframes())
    return torch.from_numpy(np.frombuffer(frames, dtype="<i2").astype(np.float32) / 32768)


def spans(probabilities):
    """Runs of windows with speech, bridging pauses shorter than PAUSE windows."""
    found = []
    for number in (number for number, probability in enumerate(probabilities) if probability >= THRESHOLD):
        if found and number - found[-1][1] < PAUSE:
            found[-1][1] = number + 1
        else:
            found.append([number, number + 1])
    return [{"start": first * WINDOW / RATE, "end": last * WINDOW / RATE} for first, last in found]
