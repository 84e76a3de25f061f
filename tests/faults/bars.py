"""The bars: what must hold whatever fails, each with the number that it is judged by.

A test in this folder names its bar with `@pytest.mark.bar("Q1")`; `make faults` prints what each came to.
"""

from __future__ import annotations

BARS = {
    "Q1": "no kill point of a writing stage leaves anything half-published: kill before, after, torn; N of N",
    "Q2": "the plain re-run heals to the reference digest, N of N; litter afterwards 0",
    "Q3": "a kill in encode-* loses at most one fragment of work",
    "Q4": "ENOSPC, EIO, EINTR, once and for good: 0 silent successes, 0 damaged published artifacts",
    "Q5": "a failing or short read is an error or gives the right result, N of N",
    "Q6": "nothing is published before it is synced, nothing done before its folder is: 0 violations",
    "Q7": "flipped bits: verify finds, and the consumer refuses, 1000 of 1000 per type of artifact",
    "Q8": "truncated, deleted, swapped, emptied, appended to: found 100 %",
    "Q9": "each invariant of verify has a mutant that only it or its group catches: 32 of 32",
    "Q10": "false alarms on clean stores, moved, copied, read-only, in another locale: 0 of 50",
    "Q11": "repair encodes exactly the damaged records again; the digest is the reference's",
    "Q12": "a resumed training equals an unbroken one bit for bit: 50 of 50 stops",
    "Q13": "SIGTERM: 50 of 50 exit 143 with a valid checkpoint, within one step and its save",
    "Q14": "what changes is encoded again and nothing else: exact counts, H1 to H19",
    "Q15": "an up-to-date chain writes nothing; at most 2 s for 1,000 samples, 15 s for 100,000",
    "Q16": "8 processes on one store, 20 rounds: 160 of 160 clean",
    "Q17": "safetensors with lying headers: 22 of 22 refused, each < 1 s and < 256 MB",
    "Q18": "pictures: every verdict as stated, colours within 1 level, peak < 512 MB",
    "Q19": "fuzz, 1000 each of pictures, safetensors, Parquet, configurations: 0 tracebacks, hangs, crashes",
    "Q20": "every failure has a listed exit code, a stable code, a fix and names the file: 100 %; exit 1: 0",
    "Q21": "secrets in output, manifests, metadata or logs: 0",
    "Q22": "files created or read outside project, caches and model folders: 0",
    "Q23": "poison with recomputed hashes is refused by default; recomputing 5 % finds 1 % in >= 95 of 100",
    "Q24": "saving, preview, verify, threads, folder, path, locale, hash seed never change the LoRA: 8 of 8",
    "Q25": "two runs in two folders: identical artifacts from encode-*, identical tensors from train",
    "Q26": "the dataset folder is the same before and after everything",
    "B6": "what will not fit on the disk is refused with 7 before a model is loaded",
    "B7": "a place that may not be written to ends every command with 7, within 2 s and before any work",
    "B8": "pictures and captions that may not be read are all listed; the others are still looked at",
    "C6": "while anyone reads or makes anything gc deletes nothing",
    "C8": "a file system without locks ends every command with 7 and a remedy",
    "L9": "a store that others may have written to is refused with 9 and a remedy; nothing made is open to all",
    "L12": "code that a model's files ask for is never imported or run",
    "L14": "no command but fetch opens a socket",
    "M4": "100,000 pictures: validate takes at most 120 s and 1 GB; at most 2,000 files in the store",
    "M5": "100,000 pictures, one changed: one is decoded and encoded; one renamed: none",
    "M6": "100,000 pictures: verify --quick takes at most 10 s",
    "M7": "1,000 checkpoints in the run folder: training starts, and verify --quick ends, within 5 s",
}
