"""Official flags that have no counterpart here: each is refused with what to use instead, never ignored."""

_NAMES = {  # remedy: flags
    "use --precision bf16": ("fp16",),
    "use --precision bf16, which needs no loss scale": ("static_loss_scale", "dynamic_loss_scale"),
    "rerun the same command: it resumes from its --work_dir": ("restart", "restart_dir"),
    "use --max_step and another --work_dir": ("debug",),
    "use torchrun --nproc_per_node N train.py, which splits the batch evenly": ("gpu0_bsz",),
    "use --mem_len": ("ext_len",),
    "the embedding has the width --d_model, which --div_val divides for rare tokens": ("d_embed",),
    "weights are initialised from N(0, --init_std^2)": ("init", "init_range", "emb_init", "emb_init_range"),
    "projections of --adaptive are initialised from N(0, 0.01^2)": ("proj_init_std",),
    "use --clip, which covers all parameters": ("clip_nonemb",),
    "use finetune.py": ("finetune_v2", "finetune_v3"),
    "use --dense_drop --method_options rate=0.5": ("expert_drop",),
    "use --moe_num_expert, or for --dense_drop --method_options blocks=16": ("num_expert",),
    "use --method_options min_temp=0.3": ("min_temp",),
    "use --method_options max_temp=2": ("max_temp",),
    "use --method_options threshold=0.001": ("threshold",),
}
REFUSED: dict[str, str] = {name: remedy for remedy, names in _NAMES.items() for name in names}
