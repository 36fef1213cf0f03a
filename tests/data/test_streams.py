import io
import json
import logging
import tarfile
from collections import Counter
from itertools import islice
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from PIL import Image
from torchdata.stateful_dataloader import StatefulDataLoader

from iomm_hf.data.sources import SourceConfig
from iomm_hf.data.streams import MixedStream, SampleStream, build_stream


def png(number, size=(12, 10)):
    buffer = io.BytesIO()
    Image.new("RGB", size, (number % 256, number // 256, 7)).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path, samples, start=0, folder=""):
    """Samples are dicts from an extension to bytes."""
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        for index, sample in enumerate(samples, start):
            for extension, data in sample.items():
                info = tarfile.TarInfo(f"{folder}{index:05d}.{extension}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))


def make_source(folder, kind, per_shard=(9, 7, 8)):
    """A folder of numbered pictures with the caption "n"; returns its captioned config."""
    folder.mkdir()
    numbers = iter(range(10_000))
    shards = [[next(numbers) for _ in range(count)] for count in per_shard]
    if kind == "tar":
        for index, shard in enumerate(shards):
            samples = [{"png": png(n), "json": json.dumps({"prompt": str(n)}).encode()} for n in shard]
            write_tar(folder / f"part-{index}.tar", samples)
        return SourceConfig(str(folder), caption_column="json.prompt")
    if kind == "parquet":
        for index, shard in enumerate(shards):
            rows = [{"image": {"bytes": png(n), "path": None}, "text": str(n)} for n in shard]
            pq.write_table(pa.Table.from_pylist(rows), folder / f"part-{index}.parquet", row_group_size=4)
        return SourceConfig(str(folder), caption_column="text")
    lines = []
    for number in [n for shard in shards for n in shard]:
        (folder / f"{number:05d}.png").write_bytes(png(number))
        lines.append(json.dumps({"file_name": f"{number:05d}.png", "text": str(number)}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return SourceConfig(str(folder), caption_column="text")


def damage(shard):
    """Cut a tar inside of its fourth sample; overwrite the second group of four rows in a parquet file."""
    data = bytearray(shard.read_bytes())
    if shard.suffix == ".tar":
        data = data[: 3 * 4 * 512 + 600]  # header and content take a block of 512 bytes each, for two files a sample
    else:
        column = pq.read_metadata(shard).row_group(1).column(0)
        start = column.dictionary_page_offset or column.data_page_offset
        data[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    shard.write_bytes(data)


def take(stream, count):
    return [facts(sample) for sample in islice(stream, count)]


def state_after(stream, count):
    take(stream, count)
    return json.loads(json.dumps(stream.state_dict()))


def facts(sample):
    """What must be equal after a resume, the pixels included."""
    return {**sample, "image": sample["image"].tobytes()}


def epoch_keys(stream, epoch=0):
    keys = []
    for sample in stream:
        if sample["epoch"] > epoch:
            return keys
        if sample["epoch"] == epoch:
            keys.append(sample["key"])


KINDS = ("tar", "parquet", "images")


class TestReading:
    @pytest.mark.parametrize("kind", KINDS)
    def test_picture_and_caption_belong_together(self, tmp_path, kind):
        stream = SampleStream(make_source(tmp_path / "a", kind), block_size=10)
        numbers = set()
        for sample in islice(stream, 24):
            red, green, _ = sample["image"].getpixel((0, 0))
            assert sample["caption"] == str(red + 256 * green)
            assert sample["skipped"] == {} and sample["epoch"] == 0
            numbers.add(int(sample["caption"]))
        assert numbers == set(range(24))

    def test_captions_are_only_read_when_asked_for(self, tmp_path):
        make_source(tmp_path / "a", "tar")
        assert next(iter(SampleStream(SourceConfig(str(tmp_path / "a")))))["caption"] is None

    def test_a_folder_may_have_any_name(self, tmp_path):
        source = make_source(tmp_path / "test [1] *", "tar")
        assert len(epoch_keys(SampleStream(source))) == 24

    def test_a_glob_is_a_source(self, tmp_path):
        make_source(tmp_path / "a", "tar")
        assert len(epoch_keys(SampleStream(SourceConfig(f"{tmp_path}/a/part-[01].tar")))) == 16

    def test_excluded_shards(self, tmp_path):
        source = make_source(tmp_path / "a", "tar")
        source.exclude = ["part-1*"]
        captions = {sample["caption"] for sample in islice(SampleStream(source), 17)}
        assert captions == {str(n) for n in [*range(9), *range(16, 24)]}

    def test_json_whose_keys_change_on_the_way(self, tmp_path):
        metas = [
            {"prompt": str(n), "tags": []} if n < 9 else {"tags": ["a"], "score": n, "prompt": "b"} for n in range(20)
        ]
        samples = [{"png": png(n), "json": json.dumps(meta).encode()} for n, meta in enumerate(metas)]
        write_tar(tmp_path / "a.tar", samples)
        source = SourceConfig(str(tmp_path / "a.tar"), caption_column="json.prompt")
        assert Counter(s["caption"] for s in islice(SampleStream(source), 20))["b"] == 11

    @pytest.mark.parametrize("ending", ["json", "jsonl"])
    def test_texts_in_a_list_beside_compressed_tars(self, tmp_path, ending):
        (tmp_path / "images").mkdir()
        for shard in range(3):
            samples = [{"jpg": png(n)} for n in range(shard * 5, shard * 5 + 5)]
            write_tar(tmp_path / f"images/{shard}.tar.gz", samples, start=shard * 5, folder="images/")
        records = [{"prompt": str(n), "output": f"/set/images/{n:05d}.png"} for n in reversed(range(15))]
        lines = [json.dumps(record) for record in records]
        text = "\n".join(lines) if ending == "jsonl" else f"[{','.join(lines)}]"
        (tmp_path / f"texts.{ending}").write_text(text)
        source = SourceConfig(
            f"{tmp_path}/images/*.tar.gz",
            caption_file=f"{tmp_path}/texts.{ending}",
            file_column="output",
            caption_column="prompt",
        )
        epoch = list(islice(SampleStream(source, block_size=4), 15))
        assert {sample["caption"] for sample in epoch} == {str(n) for n in range(15)}
        assert all(sample["image"].getpixel((0, 0))[0] == int(sample["caption"]) for sample in epoch)
        second = SampleStream(source, block_size=4)
        second.load_state_dict(state_after(SampleStream(source, block_size=4), 7))
        assert take(second, 8) == [facts(sample) for sample in epoch[7:]]
        # Another text is another data set: an exact resume must not go on with it.
        (tmp_path / f"texts.{ending}").write_text(text.replace('"14"', '"fourteen"'))
        assert SampleStream(source, block_size=4).fingerprint != second.fingerprint

    @pytest.mark.parametrize("feature", [pa.binary(), pa.struct({"bytes": pa.binary(), "path": pa.string()})])
    def test_parquet_with_plain_bytes(self, tmp_path, feature):
        values = [png(n) for n in range(3)]
        if feature != pa.binary():
            values = [{"bytes": value, "path": "x.png"} for value in values]
        pq.write_table(pa.table({"n": [1, 2, 3], "image": pa.array(values, feature)}), tmp_path / "a.parquet")
        assert len(epoch_keys(SampleStream(SourceConfig(str(tmp_path / "a.parquet"))))) == 3

    def test_paths_in_a_table_are_not_followed(self, tmp_path, caplog):
        (tmp_path / "private.png").write_bytes(png(1))
        values = [{"bytes": png(0), "path": "x.png"}, {"bytes": None, "path": str(tmp_path / "private.png")}]
        values += [{"bytes": None, "path": path} for path in ("s3://bucket/x.png", "foo://x", "/")]
        feature = pa.struct({"bytes": pa.binary(), "path": pa.string()})
        pq.write_table(pa.table({"image": pa.array(values, feature)}), tmp_path / "a.parquet")
        stream = SampleStream(SourceConfig(str(tmp_path / "a.parquet")))
        assert len(epoch_keys(stream)) == 1 and "skipped up to now: {'no_image': 4}" in caplog.text


class TestOrder:
    def test_differs_by_epoch_by_seed_and_from_stored_order(self, tmp_path):
        source = make_source(tmp_path / "a", "tar", per_shard=(40,))
        streams = [SampleStream(source, seed=seed) for seed in (0, 0, 1)]
        orders = [epoch_keys(streams[0]), epoch_keys(streams[1], epoch=1), epoch_keys(streams[2])]
        stored = [f"{streams[0].fingerprint}/0/{index}" for index in range(40)]
        assert all(sorted(order) == sorted(stored) for order in orders)
        assert len({tuple(order) for order in [*orders, stored]}) == 4

    def test_shards_are_shuffled_and_blocks_cross_their_borders(self, tmp_path):
        stream = SampleStream(make_source(tmp_path / "a", "tar", per_shard=(4,) * 8), block_size=8)
        shards = [key.split("/")[1] for key in epoch_keys(stream)]
        assert all(len(set(shards[start : start + 8])) == 2 for start in range(0, 32, 8))
        assert shards != sorted(shards)

    def test_same_seed_same_order(self, tmp_path):
        source = make_source(tmp_path / "a", "parquet")
        assert take(SampleStream(source, seed=3), 30) == take(SampleStream(source, seed=3), 30)


class TestConsumers:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("world_size", [1, 2, 3, 5])
    def test_each_key_once_an_epoch_over_all_ranks(self, tmp_path, kind, world_size):
        source = make_source(tmp_path / "a", kind)
        single = epoch_keys(SampleStream(source))
        for epoch in (0, 1):
            streams = [SampleStream(source, rank=rank, world_size=world_size) for rank in range(world_size)]
            keys = [key for stream in streams for key in epoch_keys(stream, epoch)]
            assert sorted(keys) == sorted(single)

    @pytest.mark.parametrize(("kind", "shards"), [("tar", 5), ("tar", 1), ("parquet", 3)])
    def test_each_key_once_an_epoch_over_ranks_and_workers(self, tmp_path, kind, shards):
        source = make_source(tmp_path / "a", kind, per_shard=(8,) * shards)
        keys = Counter()
        for rank in range(2):
            stream = SampleStream(source, rank=rank, world_size=2, block_size=3)
            loader = StatefulDataLoader(stream, batch_size=None, num_workers=2)
            # Workers take turns, so the longer of two first epochs ends after twice its length.
            for sample in islice(loader, 2 * 8 * shards):
                keys.update([sample["key"]] if sample["epoch"] == 0 else [])
        assert len(keys) == 8 * shards
        assert set(keys.values()) == {1}

    def test_too_few_samples_for_a_consumer(self, tmp_path):
        source = make_source(tmp_path / "a", "tar", per_shard=(2,))
        streams = [SampleStream(source, rank=rank, world_size=3) for rank in range(3)]
        with pytest.raises(ValueError, match=r"consumer 2 of 3 no usable sample .* fewer samples than"):
            for stream in streams:
                next(iter(stream))


class TestResume:
    """Take some, save, rebuild, compare with the stream that was never interrupted."""

    def check(self, build, before, after=40):
        expected = take(build(), before + after)
        first = build()
        assert take(first, before) == expected[:before]
        second = build()
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert take(second, after) == expected[before:]

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("rank", [0, 1])
    @pytest.mark.parametrize("before", [0, 1, 7, 11, 12, 40])  # an epoch of a rank has about 12 samples
    def test_exact_across_epochs_and_ranks(self, tmp_path, kind, rank, before):
        source = make_source(tmp_path / "a", kind)
        self.check(lambda: SampleStream(source, seed=1, block_size=5, rank=rank, world_size=2), before)

    @pytest.mark.parametrize("kind", ["tar", "parquet"])
    def test_exact_among_bad_samples_and_damaged_shards(self, tmp_path, kind):
        source = make_source(tmp_path / "a", kind, per_shard=(9, 9, 9))
        source.caption_column = None
        if kind == "tar":
            write_tar(tmp_path / "a" / "part-3.tar", [{"png": b"text"}] * 4)
        else:
            rows = [{"image": {"bytes": b"text", "path": None}, "text": ""}] * 4
            pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a" / "part-3.parquet")
        for index in (1, 2):
            damage(tmp_path / "a" / f"part-{index}.{kind}")
        for before in range(20):
            self.check(lambda: SampleStream(source, block_size=4), before, after=20)

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_exact_in_a_stateful_data_loader(self, tmp_path, kind, num_workers):
        source = make_source(tmp_path / "a", kind)

        def loader():
            stream = SampleStream(source, block_size=5)
            return StatefulDataLoader(stream, batch_size=3, num_workers=num_workers, collate_fn=collate)

        expected = list(islice(loader(), 20))
        first = loader()
        assert list(islice(first, 9)) == expected[:9]
        second = loader()
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert list(islice(second, 11)) == expected[9:]

    def test_exact_through_accelerate(self, tmp_path):
        source = make_source(tmp_path / "a", "parquet")
        config = DataLoaderConfiguration(use_stateful_dataloader=True, dispatch_batches=False)

        def prepare():
            accelerator = Accelerator(cpu=True, dataloader_config=config)
            loader = torch.utils.data.DataLoader(SampleStream(source, block_size=5), batch_size=3, collate_fn=collate)
            return accelerator, accelerator.prepare(loader)

        expected = list(islice(prepare()[1], 20))
        accelerator, loader = prepare()
        batches = iter(loader)
        assert list(islice(batches, 9)) == expected[:9]
        accelerator.save_state(str(tmp_path / "state"))
        accelerator, loader = prepare()
        accelerator.load_state(str(tmp_path / "state"))
        assert list(islice(loader, 11)) == expected[9:]

    @pytest.mark.parametrize(
        ("change", "name"),
        [
            ({"seed": 1}, "seed"),
            ({"block_size": 6}, "block_size"),
            ({"rank": 1}, "consumer"),
            ({"rank": 0, "world_size": 3}, "num_consumers"),
        ],
    )
    def test_a_state_of_another_order_is_refused(self, tmp_path, change, name):
        source = make_source(tmp_path / "a", "tar")
        options = {"seed": 0, "block_size": 5, "rank": 0, "world_size": 2}
        state = SampleStream(source, **options).state_dict()
        with pytest.raises(ValueError, match=f"belongs to another stream.*'{name}'"):
            SampleStream(source, **{**options, **change}).load_state_dict(state)

    def test_a_state_of_another_source_is_refused(self, tmp_path):
        source = make_source(tmp_path / "a", "tar")
        state = SampleStream(source).state_dict()
        write_tar(tmp_path / "a" / "part-9.tar", [{"png": png(1), "json": b'{"prompt": "a"}'}])
        with pytest.raises(ValueError, match="fingerprint"):
            SampleStream(source).load_state_dict(state)

    def test_a_stream_begun_here_is_refused_in_a_worker(self, tmp_path, monkeypatch):
        stream = SampleStream(make_source(tmp_path / "a", "tar"))
        next(iter(stream))
        worker = SimpleNamespace(id=0, num_workers=2)
        monkeypatch.setattr("iomm_hf.data.streams.get_worker_info", lambda: worker)
        with pytest.raises(ValueError, match="num_consumers"):
            next(iter(stream))


def collate(samples):
    return [{**sample, "image": list(sample["image"].tobytes())} for sample in samples]


class TestBadSamples:
    def run_epoch(self, source):
        """Captions of the first epoch, and skip counts up to the second one's first sample: those of bad samples at the
        end of an epoch come with the next good one."""
        captions, skipped = [], Counter()
        for sample in SampleStream(source, block_size=4):
            skipped.update(sample["skipped"])
            if sample["epoch"] == 1:
                return captions, skipped
            captions.append(sample["caption"])

    def test_are_skipped_counted_and_reported(self, tmp_path, caplog):
        bad = {"too_large": png(0, (60, 60)), "too_small": png(0, (1, 1)), "unknown_format": b"text", "no_image": b""}
        bad["undecodable"] = png(0)[:-30]
        samples = [{"png": png(n), "txt": b"good\n"} for n in range(5)]
        samples += [{"png": data, "txt": reason.encode()} for reason, data in bad.items()]
        samples += [{"png": png(0), "txt": b" "}, {"png": png(0)}]
        write_tar(tmp_path / "a.tar", samples)
        source = SourceConfig(str(tmp_path / "a.tar"), caption_column="txt", max_pixels=3000)
        with caplog.at_level(logging.WARNING):
            captions, skipped = self.run_epoch(source)
        assert captions == ["good"] * 5
        # The first sample of epoch 1 may follow bad ones of its own epoch.
        assert set(skipped) == {*bad, "bad_caption"}
        assert skipped["bad_caption"] >= 2
        assert "a.tar::00006 (too_small): 1x1 pixels" in caplog.text
        assert "a.tar::00011 (bad_caption): expected text in txt, got 'None'" in caplog.text

    def test_details_are_not_repeated_for_ever(self, tmp_path, caplog):
        write_tar(tmp_path / "a.tar", [{"png": png(n)} for n in range(5)] + [{"png": b"text"}] * 50)
        _, skipped = self.run_epoch(SourceConfig(str(tmp_path / "a.tar")))
        assert skipped["unknown_format"] >= 50
        assert caplog.text.count("(unknown_format)") == 5
        assert "counted and no longer listed" in caplog.text

    @pytest.mark.parametrize("kind", ["tar", "parquet"])
    def test_a_damaged_shard_ends_early_and_the_next_is_read(self, tmp_path, kind, caplog):
        source = make_source(tmp_path / "a", kind, per_shard=(20, 20, 20))
        middle = sorted((tmp_path / "a").iterdir())[1]
        damage(middle)
        captions, _ = self.run_epoch(source)
        read = 3 if kind == "tar" else 0  # pyarrow reads a group ahead and drops it when the next one fails
        assert sorted(map(int, captions)) == [*range(20 + read), *range(40, 60)]
        assert "skipped up to now: {'corrupt_shard': 1}" in caplog.text
        assert f"{middle} (corrupt_shard): left out from example {read} on" in caplog.text

    def test_a_tar_cut_inside_of_a_header(self, tmp_path, caplog):
        source = make_source(tmp_path / "a", "tar", per_shard=(20, 20))
        shard = tmp_path / "a" / "part-0.tar"
        shard.write_bytes(shard.read_bytes()[: 6 * 4 * 512 + 100])
        captions, _ = self.run_epoch(source)
        assert sorted(map(int, captions)) == [*range(6), *range(20, 40)]
        assert "skipped up to now: {'corrupt_shard': 1}" in caplog.text
        assert "left out from example 6 on: ReadError: cut short" in caplog.text

    def test_missing_file_of_an_image_folder(self, tmp_path):
        source = make_source(tmp_path / "a", "images")
        (tmp_path / "a" / "00003.png").unlink()
        captions, skipped = self.run_epoch(source)
        assert sorted(map(int, captions)) == [n for n in range(24) if n != 3]
        assert skipped["missing_file"] >= 1

    def test_an_epoch_without_a_usable_sample_raises(self, tmp_path):
        write_tar(tmp_path / "a.tar", [{"png": b"text"}] * 6)
        with pytest.raises(ValueError, match=r"a\.tar.* no usable sample in epoch 0; skipped: {'unknown_format': 6}"):
            next(iter(SampleStream(SourceConfig(str(tmp_path / "a.tar")))))


class TestRefusedSources:
    def refuse(self, match, path, **options):
        with pytest.raises(ValueError, match=match):
            SampleStream(SourceConfig(str(path), **options))

    def test_missing_columns(self, tmp_path):
        make_source(tmp_path / "a", "tar")
        columns = r"\['png', 'json', '__key__', '__url__'\]"
        self.refuse(f"no column 'jpg'; its columns are {columns}", tmp_path / "a", image_column="jpg")
        self.refuse(f"no column 'txt'; its columns are {columns}", tmp_path / "a", caption_column="txt")
        self.refuse("'json' of .* has no key 'text'", tmp_path / "a", caption_column="json.text")
        self.refuse("'png' of .* has no key 'text'", tmp_path / "a", caption_column="png.text")

    def test_no_image_column(self, tmp_path):
        pq.write_table(pa.table({"url": ["a"], "text": ["b"]}), tmp_path / "a.parquet")
        self.refuse(r"no image column .* \['url', 'text'\]", tmp_path / "a.parquet")

    def test_no_such_path(self, tmp_path):
        self.refuse("cannot open", tmp_path / "no")
        self.refuse("cannot open", tmp_path / "no-*.tar")
        self.refuse("cannot open", "./no/such/folder")

    def test_empty_folder_and_mixture(self, tmp_path):
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "README.md").write_text("nothing here")
        self.refuse("files of one kind .* found none", tmp_path / "a")
        write_tar(tmp_path / "a" / "a.tar", [{"png": png(0)}])
        (tmp_path / "a" / "b.png").write_bytes(png(0))
        self.refuse("found {'webdataset': 1, 'imagefolder': 1}|found {'imagefolder': 1", tmp_path / "a")

    def test_empty_and_damaged_first_files(self, tmp_path):
        write_tar(tmp_path / "a.tar", [])
        (tmp_path / "b.tar").write_bytes(b"text" * 1000)
        (tmp_path / "c.parquet").write_bytes(b"text" * 1000)
        for name in ("a.tar", "b.tar", "c.parquet"):
            self.refuse(f"first file of .*{name}, is empty or damaged", tmp_path / name)

    def test_parquet_without_rows(self, tmp_path):
        pq.write_table(pa.table({"image": pa.array([], pa.binary())}), tmp_path / "a.parquet")
        with pytest.raises(ValueError, match="no usable sample"):
            next(iter(SampleStream(SourceConfig(str(tmp_path / "a.parquet")))))

    def test_exclude_must_match_and_leave_something(self, tmp_path):
        make_source(tmp_path / "a", "tar")
        self.refuse(r"exclude 'geneval\*' matches none", tmp_path / "a", exclude=["geneval*"])
        self.refuse("leaves no file", tmp_path / "a", exclude=["*"])

    def test_lists_of_texts_that_do_not_fit(self, tmp_path):
        make_source(tmp_path / "a", "tar")
        make_source(tmp_path / "b", "parquet")
        texts = tmp_path / "texts.json"
        self.refuse("needs a caption_column", tmp_path / "a", caption_file=str(texts))
        options = {"caption_file": str(texts), "caption_column": "text"}
        self.refuse("goes with tars", tmp_path / "b", **options)
        self.refuse("cannot open caption_file", tmp_path / "a", **options)
        texts.write_text('[{"file_name": "00000.png"}]')
        self.refuse("fields 'file_name' and 'text', .* KeyError: 'text'", tmp_path / "a", **options)
        texts.write_text('[{"file_name": "x/1.png", "text": "a"}, {"file_name": "y/1.png", "text": "b"}]')
        self.refuse("names 1 of its pictures twice", tmp_path / "a", **options)
        texts.write_text("{")
        self.refuse("as a list .*JSONDecodeError", tmp_path / "a", **options)

    def test_several_metadata_files(self, tmp_path):
        make_source(tmp_path / "a", "images")
        (tmp_path / "a" / "metadata.csv").write_text("file_name,text\n00000.png,a\n")
        self.refuse("several metadata files", tmp_path / "a")

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"path": ""}, "path is empty"),
            ({"weight": 0.0}, "got 0.0"),
            ({"weight": float("nan")}, "got nan"),
            ({"exclude": "a*"}, "list of glob patterns"),
            ({"min_side": 0}, "got 0"),
            ({"max_pixels": 63}, "got 63"),
        ],
    )
    def test_config(self, options, match):
        with pytest.raises(ValueError, match=match):
            SourceConfig(**{"path": "a", **options})

    @pytest.mark.parametrize("options", [{"split": "test"}, {"config": "a"}, {"revision": "main"}])
    def test_hub_options_for_a_local_path(self, tmp_path, options):
        make_source(tmp_path / "a", "tar")
        self.refuse("for Hub ids", tmp_path / "a", **options)

    @pytest.mark.parametrize("options", [{"seed": -1}, {"block_size": 0}, {"rank": 2, "world_size": 2}])
    def test_stream_options(self, tmp_path, options):
        with pytest.raises(ValueError, match="0 <= rank < world_size"):
            SampleStream(make_source(tmp_path / "a", "tar"), **options)


class TestMixed:
    @pytest.fixture
    def sources(self, tmp_path):
        paired = make_source(tmp_path / "a", "tar")
        images = [make_source(tmp_path / name, kind) for name, kind in (("b", "parquet"), ("c", "images"))]
        for source in images:
            source.caption_column = None
        images[1].weight = 3.0
        return images, [paired]

    def test_shares_captions_and_source_indices(self, sources):
        counts = Counter()
        for sample in islice(build_stream(*sources, mix_ratio=0.8), 1000):
            counts[sample["source"]] += 1
            assert (sample["caption"] is None) == (sample["source"] < 2)
        for source, share in enumerate((0.2, 0.6, 0.2)):
            assert abs(counts[source] / 1000 - share) < 0.05

    def test_keys_are_unique_over_sources(self, sources):
        keys = {}
        for sample in islice(build_stream(*sources, mix_ratio=0.5), 200):
            assert keys.setdefault(sample["key"], sample["source"]) == sample["source"]

    @pytest.mark.parametrize("rank", [0, 1])
    @pytest.mark.parametrize("before", [0, 3, 40])
    def test_resume(self, sources, rank, before):
        def build():
            return build_stream(*sources, mix_ratio=0.5, seed=2, block_size=5, rank=rank, world_size=2)

        TestResume().check(build, before)

    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_resume_in_a_stateful_data_loader(self, sources, num_workers):
        def loader():
            stream = build_stream(*sources, mix_ratio=0.5, block_size=5)
            return StatefulDataLoader(stream, batch_size=3, num_workers=num_workers, collate_fn=collate)

        expected = list(islice(loader(), 20))
        first = loader()
        assert list(islice(first, 9)) == expected[:9]
        second = loader()
        second.load_state_dict(first.state_dict())
        assert list(islice(second, 11)) == expected[9:]

    def test_a_state_of_another_mixture_is_refused(self, sources):
        state = build_stream(*sources, mix_ratio=0.5).state_dict()
        with pytest.raises(ValueError, match="weights"):
            build_stream(*sources, mix_ratio=0.6).load_state_dict(state)

    def test_draws_differ_by_consumer(self, sources):
        streams = [build_stream(*sources, mix_ratio=0.5, rank=rank, world_size=2) for rank in range(2)]
        draws = [[sample["source"] for sample in islice(stream, 40)] for stream in streams]
        assert draws[0] != draws[1]

    def test_a_group_without_a_share_is_not_opened(self, sources):
        images, _ = sources
        absent = SourceConfig("/no/such/*.tar", caption_column="txt")
        stream = build_stream(images, [absent], mix_ratio=1.0)
        assert len(stream.streams) == 2

    @pytest.mark.parametrize("mix_ratio", [-0.1, 1.1, float("nan")])
    def test_ratio_must_lie_in_0_1(self, sources, mix_ratio):
        with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
            build_stream(*sources, mix_ratio=mix_ratio)

    def test_groups_and_ratio_must_go_together(self, sources):
        images, pairs = sources
        for arguments, match in [
            ((images, pairs), "expected mix_ratio"),
            (([], []), "expected mix_ratio"),
            ((images, [], 0.5), "50% of samples from paired sources, but none"),
            (([], pairs, 0.5), "50% of samples from image sources, but none"),
            ((pairs, []), "image-only sources read no captions"),
            (([], images), "need a caption_column"),
        ]:
            with pytest.raises(ValueError, match=match):
                build_stream(*arguments)

    def test_the_same_source_twice(self, sources):
        images, _ = sources
        with pytest.raises(ValueError, match="listed twice"):
            build_stream([images[0], images[0]])

    def test_one_weight_a_stream(self, sources):
        with pytest.raises(ValueError, match="1 streams and 2 weights"):
            MixedStream([SampleStream(sources[1][0])], [1.0, 2.0])
