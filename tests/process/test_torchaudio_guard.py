"""The guard makes torchaudio, and transformers' audio classes, importable beside any torch build."""

import subprocess
import sys


def test_torchaudio_and_transformers_audio_import_after_the_package():
    program = (
        "import d2v_scale, torch, torchaudio\n"
        "from transformers import Data2VecAudioModel\n"
        "wave = torch.sin(torch.arange(800) / 10)\n"
        "assert torchaudio.functional.resample(wave, 8000, 16000).shape == (1600,)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_importing_the_package_loads_no_heavy_library():
    program = (
        "import sys, d2v_scale\n"
        "heavy = {'torch', 'torchaudio', 'transformers', 'mlflow', 'deepspeed'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
