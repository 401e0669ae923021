"""Out of memory says what takes how much and what to change."""


def test_out_of_memory_names_parts_and_options(workers, jobsite):
    words = ["train.micro_batch_size=2", "train.recompute=selective", "precision=bf16"]
    (said,) = workers(1).run("memory_sentence", config=jobsite.config, overrides=words)
    assert said.startswith("out of memory: weights 0.00 GiB, gradients 0.00 GiB, optimizer 0.00 GiB. ")
    assert "Set train.micro_batch_size=1; or train.recompute=full. Nothing was saved" in said
