"""What other programs call our keys: fairseq, the Hugging Face Trainer, timm, lightly-train, Lightning, megatron-lm.

A row is our key and the names that it goes by elsewhere; where a value means something else there, `HOW` says how to
get ours.
"""

_WHOLE_STEP = "It is the size of a whole step over all processes: what each takes x processes x accumulation."
_STEPS = "A run is as long as its steps: epochs x samples / global_batch_size; `d2v inspect SHARDS` counts the samples."
_PROCESSES = "Processes are the launcher's: `d2v train --ranks N`, `deepspeed --num_gpus N`, `srun`."

_NAMES: dict[str, str] = {
    "recipe": "arch architecture cfg conf config config_dir config_file config_name config_path model_name yaml",
    "data": "data_dir data_path data_root datadir dataset dataset_name dataset_path root shards train_data train_dir "
    "train_file train_files train_folder train_path train_shards train_subset",
    "evaluation.held_out": "dev_data eval_data eval_dataset val_data val_dir valid_data valid_subset validation_data "
    "validation_file",
    "run_dir": "default_root_dir exp_dir experiment_dir log_dir logdir out out_dir output output_dir output_path "
    "save_dir save_path work_dir workdir",
    "resume": "auto_resume continue_from load load_checkpoint restore_file resume_from resume_from_checkpoint "
    "resume_interrupted resume_path",
    "init_from": "finetune finetune_from_model from_pretrained init_checkpoint load_from model_name_or_path model_path "
    "no_pretrained_weights pretrained pretrained_checkpoint pretrained_model w2v_path weights",
    "optim.lr": "base_lr blr init_lr initial_lr learning_rate lr_peak lr_rate max_lr peak_lr",
    "optim.min_lr": "end_learning_rate final_lr lr_end lr_min min_learning_rate minimum_lr",
    "optim.schedule": "lr_decay_style lr_schedule lr_scheduler lr_scheduler_type sched scheduler",
    "optim.warmup_steps": "lr_warmup_iters lr_warmup_steps num_warmup_steps warmup warmup_epochs warmup_fraction "
    "warmup_iters warmup_proportion warmup_ratio warmup_updates",
    "optim.max_steps": "epoch epochs iterations iters max_epoch max_epochs max_iters max_update max_updates n_epochs "
    "n_iters num_epochs num_iterations num_steps num_train_epochs num_train_steps num_training_steps num_updates steps "
    "total_epochs total_num_update total_num_updates total_steps train_epochs train_iters train_steps",
    "optim.betas": "adam_beta1 adam_beta2 adam_betas beta1 beta2 opt_betas",
    "optim.eps": "adam_eps adam_epsilon epsilon opt_eps",
    "optim.weight_decay": "decay l2 wd weight_decay_rate",
    "optim.clip": "clip_grad clip_grad_norm clip_norm clip_value grad_clip grad_clip_norm gradient_clip "
    "gradient_clip_val gradient_clipping max_grad_norm max_norm",
    "optim.decay_on": "no_decay_bias no_weight_decay",
    "global_batch_size": "batch batch_per_gpu batch_size batch_size_per_device batch_size_per_gpu batchsize bs bsz "
    "max_sentences max_tokens micro_batch_size per_device_batch_size per_device_train_batch_size "
    "per_gpu_train_batch_size total_batch_size train_batch_size train_micro_batch_size_per_gpu",
    "accumulation": "accum accum_iter accum_steps accumulate_grad_batches accumulation_steps grad_accum "
    "grad_accum_steps gradient_accumulation gradient_accumulation_steps update_freq",
    "precision": "amp amp_dtype bf16 dtype fp16 fp32 half mixed_precision tf32 torch_dtype use_amp",
    "seed": "data_seed manual_seed random_seed rng_seed",
    "data.workers": "dataloader_num_workers dataloader_workers j loader_workers n_workers num_data_workers num_loader "
    "num_workers",
    "objective.masking.prob": "mask_p mask_percent mask_prob mask_rate mask_ratio mask_time_prob masking_prob "
    "masking_rate masking_ratio mlm_prob mlm_probability",
    "objective.masking.length": "block_size mask_block_size mask_length mask_patch_size mask_time_length span_length",
    "objective.masking.kind": "mask_selection mask_type masking_mode masking_type",
    "objective.masking.clones": "clone_batch masks_per_sample multi_mask n_masks num_masks",
    "objective.ema.start": "ema ema_decay ema_decay_start ema_momentum ema_start_decay momentum momentum_teacher "
    "moving_average_decay tau teacher_momentum",
    "objective.ema.end": "ema_decay_end ema_end_decay final_momentum_teacher",
    "objective.ema.anneal_steps": "ema_anneal_end_step ema_anneal_steps",
    "objective.target.top_k_layers": "average_top_k_layers avg_top_k top_k",
    "objective.loss.beta": "huber_beta l1_beta loss_beta smooth_l1_beta",
    "objective.loss.cls_weight": "cls_loss",
    "model.backbone.width": "d_model dim embed_dim embedding_dim encoder_embed_dim hidden_dim hidden_size",
    "model.backbone.depth": "encoder_layers layers n_layer n_layers num_hidden_layers num_layers",
    "model.backbone.heads": "encoder_attention_heads n_head n_heads num_attention_heads num_heads",
    "model.backbone.ffn": "encoder_ffn_embed_dim ffn_dim ffn_hidden_size intermediate_size mlp_dim mlp_ratio",
    "model.backbone.drop_path": "drop_path_rate stochastic_depth",
    "model.backbone.attention_dropout": "attention_probs_dropout_prob attn_drop attn_dropout",
    "model.backbone.dropout": "drop encoder_dropout hidden_dropout hidden_dropout_prob",
    "model.backbone.layer_drop": "encoder_layerdrop layerdrop",
    "model.backbone.prenet_depth": "prenet_layers",
    "model.predictor.width": "decoder_dim decoder_embed_dim",
    "model.predictor.layers": "decoder_depth decoder_layers",
    "model.vision.image_size": "crop_size image_res img_size input_size resolution",
    "model.activation_checkpointing": "activations_checkpoint checkpoint_activations grad_checkpointing "
    "gradient_checkpointing recompute use_checkpoint",
    "model.compile": "compile_model torch_compile torchcompile",
    "data.speech.max_seconds": "max_audio_length max_duration max_duration_in_seconds max_sample_size",
    "data.speech.min_seconds": "min_duration min_duration_in_seconds min_sample_size",
    "data.text.tokenizer": "bpe spm spm_model tokenizer_name tokenizer_path",
    "checkpoint.every": "checkpoint_every checkpoint_interval ckpt_every save_every save_freq save_interval "
    "save_interval_updates save_steps",
    "checkpoint.keep_last": "keep_checkpoints keep_interval_updates keep_last_epochs max_checkpoints save_total_limit",
    "evaluation.every": "eval_every eval_freq eval_interval eval_steps val_check_interval validate_interval "
    "validate_interval_updates",
    "evaluation.batch_size": "eval_batch_size per_device_eval_batch_size",
    "tracking.log_every": "log_every log_every_n_steps log_freq log_interval log_steps logging_steps print_freq",
    "tracking.enabled": "logger report_to use_mlflow use_wandb wandb",
    "tracking.experiment": "experiment experiment_name mlflow_experiment project project_name wandb_project",
    "tracking.run_name": "exp_name mlflow_run_name wandb_name",
    "deepspeed_config": "deepspeed deepspeed_config_file ds_config fsdp zero zero_stage zero_optimization",
    "parallel.tensor": "model_parallel_size mp_size tensor_model_parallel_size tensor_parallel tensor_parallel_size tp "
    "tp_size",
    "parallel.pipeline": "pipeline_model_parallel_size pipeline_parallel pipeline_parallel_size pp pp_size",
    "profile.steps": "profile_steps profiler",
    "task.freeze_updates": "freeze_finetune_updates",
    "print_config": "dump_config show_config",
}

HOW: dict[str, str] = {
    "optim.max_steps": _STEPS,
    "global_batch_size": _WHOLE_STEP,
    "recipe": "It takes the name of a recipe (`--list_recipes`) or a YAML file.",
    "run_dir": "It is the folder of the run.",
    "resume": "It takes the folder of a run; the same recipe in an existing --run_dir continues by itself, too.",
    "init_from": "It takes a checkpoint or the folder of a run; of other weights, after `d2v import`.",
    "optim.warmup_steps": "It counts steps: a share or epochs times what a whole run or an epoch has.",
    "optim.betas": "Both are given: --optim.betas '[0.9, 0.98]'.",
    "precision": "It is bf16, fp32 or auto (bf16 where it is faster); there is no fp16.",
    "deepspeed_config": "It takes a JSON, such as ds_configs/zero3.json.",
    "model.backbone.ffn": "It is the width itself, not a ratio.",
    "data.speech.max_seconds": "It is in seconds; of samples, divide by 16000.",
    "data.speech.min_seconds": "It is in seconds; of samples, divide by 16000.",
    "objective.ema.start": "It rises to objective.ema.end.",
    "evaluation.held_out": "Shards without labels; labelled ones: --evaluation.train and --evaluation.test.",
}
"""What to know of our key beside its name."""

OF_THE_LAUNCHER = {
    *("accelerator", "device", "devices", "distributed_world_size", "gpus", "local_world_size", "master_addr"),
    *("master_port", "n_gpu", "n_gpus", "ngpus", "nnodes", "nproc_per_node", "num_devices", "num_gpus", "num_nodes"),
    *("num_processes", "strategy", "world_size"),
}
"""What is no key of a recipe, which is the same on any number of processes."""

KEY_OF = {name: key for key, names in _NAMES.items() for name in names.split()}
"""Our key by the other's name."""


def answer(name: str) -> str | None:
    """What to write for a key of another program, as a sentence or two; None: it is not known. `name` without dashes
    in front, perhaps with sections (`optimization.max_update`)."""
    last = name.rpartition(".")[2].replace("-", "_").lower()
    if last in OF_THE_LAUNCHER:
        return _PROCESSES
    key = KEY_OF.get(last)
    return None if key is None else f"Did you mean {key!r}? {HOW.get(key, '')}".strip()
