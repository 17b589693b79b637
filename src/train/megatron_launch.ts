/**
 * How Megatron Core is started for a model and a layout: its arguments, the same as a shell script, and the
 * script that makes its own checkpoint files of the exported ones.
 */
import type { NemotronHConfig } from "../models/config.ts";
import { layerSpecs, mtpSpecs } from "../models/config.ts";
import { neighboursOf } from "../nn/division.ts";
import { parseRecompute } from "../nn/recompute.ts";
import type { Layout } from "../parallel/layout.ts";
import { formatLayout, worldOf } from "../parallel/layout.ts";
import { MEGATRON_INDEX } from "../parallel/megatron.ts";
import { formatHybrid, stagesOf } from "../parallel/stages.ts";
import type { Recipe } from "./recipe.ts";

/** One argument: its name, and its values; none for a switch. */
export type LaunchArgument = readonly [name: string, ...values: string[]];

export interface Launch {
  /** Ranks that the layout needs. */
  readonly world: number;
  readonly layout: string;
  readonly arguments: readonly LaunchArgument[];
  /** What releases that do not know --hybrid-layer-pattern take in its place. */
  readonly older_releases: readonly LaunchArgument[];
  readonly notes: readonly string[];
}

const CP_KINDS = { ring: "p2p", allgather: "all_gather", alltoall: "a2a", hierarchical: "a2a+p2p" } as const;

/** Recipes of low precision that Megatron Core has too. */
const PRECISIONS: Readonly<Record<string, readonly LaunchArgument[]>> = {
  "fp8-delayed": [["--fp8-format", "hybrid"], ["--fp8-recipe", "delayed"]],
  "fp8-current": [["--fp8-format", "hybrid"], ["--fp8-recipe", "tensorwise"]],
  "fp8-blockwise": [["--fp8-format", "e4m3"], ["--fp8-recipe", "blockwise"]],
  mxfp8: [["--fp8-format", "e4m3"], ["--fp8-recipe", "mxfp8"]],
  nvfp4: [["--fp4-format", "e2m1"], ["--fp4-recipe", "nvfp4"]],
};

/**
 * The arguments of Megatron Core for the model and the layout.
 * @param training null for a model without a training run: batch, schedule and optimiser are left to the user
 */
export function launchOf(config: NemotronHConfig, layout: Layout, training: Recipe | null): Launch {
  const older = olderPattern(config, layout);
  return {
    world: worldOf(layout), layout: formatLayout(layout),
    arguments: [
      ...parallelArguments(config, layout), ...modelArguments(config, layout, depthsOf(config, training)),
      ...expertArguments(config, layout, training), ...mtpArguments(config, training),
      ...(training ? trainingArguments(layout, training) : []),
      ["--bf16"], ["--use-mcore-models"], ["--transformer-impl", "transformer_engine"],
      ["--ckpt-format", "torch"], ["--no-load-optim"], ["--no-load-rng"],
    ],
    older_releases: older.arguments,
    notes: [
      ...older.notes,
      "The checkpoint holds weights alone: optimiser state, random state and position in the data are not in "
        + "it, and training starts at step 0 of the schedule.",
      "Paths of data, tokenizer and output are yours to add.",
      ...(training && (training.batch * training.accumulate) % layout.dp !== 0
        ? [`The run's ${training.batch * training.accumulate} sequences a step do not divide among dp=`
          + `${layout.dp} replicas: choose another --global-batch-size.`] : []),
      ...(training?.bias_update === "quantile"
        ? ["The run moved its routers' biases by quantiles, Megatron Core moves them by sign."] : []),
      ...(training ? [] : ["Batch sizes, schedule and optimiser are not known of this model: add them."]),
      ...(training && !(training.precision in PRECISIONS) && training.precision !== "bf16"
        ? [`The run computed in ${training.precision}; these arguments train in bf16.`] : []),
    ],
  };
}

const number = (value: number): string => String(value);

function parallelArguments(config: NemotronHConfig, layout: Layout): LaunchArgument[] {
  const neighbours = neighboursOf(layout.cp, Math.max(1, config.num_key_value_heads / layout.tp));
  return [
    ["--tensor-model-parallel-size", number(layout.tp)],
    ["--pipeline-model-parallel-size", number(layout.pp)],
    ["--context-parallel-size", number(layout.cp)],
    ["--expert-model-parallel-size", number(layout.ep)],
    ["--expert-tensor-parallel-size", number(layout.etp)],
    ...(layout.sp ? [["--sequence-parallel"] as const] : []),
    ...(layout.cp > 1 ? [["--cp-comm-type", CP_KINDS[layout.cp_kind]] as const] : []),
    ...(layout.cp > 1 && layout.cp_kind === "hierarchical" ? [[
      "--hierarchical-context-parallel-sizes", number(neighbours), number(layout.cp / neighbours),
    ] as const] : []),
    ["--use-distributed-optimizer"], ["--overlap-grad-reduce"], ["--overlap-param-gather"],
    ...(layout.overlap ? [["--overlap-moe-expert-parallel-comm"], ["--delay-wgrad-compute"]] as const : []),
  ];
}

function modelArguments(config: NemotronHConfig, layout: Layout, depths: number): LaunchArgument[] {
  // No row is added to the table: the largest power of two that tp times it divides the vocabulary.
  let multiple = 128;
  while (config.vocab_size % (multiple * layout.tp) !== 0) multiple /= 2;
  const { intermediate_size: size } = config;
  const width = [...layerSpecs(config), ...mtpSpecs(config)].flatMap((spec) =>
    spec.kind === "mlp" ? [spec.intermediate_size] : [])[0];
  return [
    // The pattern says how many layers there are: --num-layers beside it is refused.
    ["--is-hybrid-model"], ["--hybrid-layer-pattern", stagePattern(config, layout, depths)],
    ["--spec", "megatron.core.models.mamba.mamba_layer_specs", "mamba_stack_spec"],
    ["--hidden-size", number(config.hidden_size)],
    ["--ffn-hidden-size", number(width ?? (typeof size === "number" ? size : size[0] ?? config.hidden_size))],
    ["--num-attention-heads", number(config.num_attention_heads)], ["--group-query-attention"],
    ["--num-query-groups", number(config.num_key_value_heads)], ["--kv-channels", number(config.head_dim)],
    ["--mamba-num-heads", number(config.mamba_num_heads)],
    ["--mamba-head-dim", number(config.mamba_head_dim)],
    ["--mamba-state-dim", number(config.ssm_state_size)], ["--mamba-num-groups", number(config.n_groups)],
    ["--normalization", "RMSNorm"], ["--norm-epsilon", number(config.layer_norm_epsilon)],
    ["--squared-relu"], ["--position-embedding-type", "none"], ["--untie-embeddings-and-output-weights"],
    ["--disable-bias-linear"], ["--attention-dropout", "0.0"], ["--hidden-dropout", "0.0"],
    ["--init-method-std", number(config.initializer_range)],
    ["--max-position-embeddings", number(config.max_position_embeddings)],
    ["--vocab-size", number(config.vocab_size)], ["--make-vocab-size-divisible-by", number(multiple)],
  ];
}

/** How often training passes the prediction block. */
function depthsOf(config: NemotronHConfig, training: Recipe | null): number {
  return config.num_nextn_predict_layers === 0 ? 0 : training?.mtp_depths ?? 1;
}

/** The pattern with stage boundaries, and the prediction block's layers once for every depth. */
function stagePattern(config: NemotronHConfig, layout: Layout, depths: number): string {
  const { hybrid_override_pattern: pattern, mtp_hybrid_override_pattern: block } = config;
  const stages = stagesOf(layout, config).map(({ from, to }) => pattern.slice(from, to));
  return formatHybrid({ stages, depths: Array.from({ length: depths }, () => block) });
}

function olderPattern(
  config: NemotronHConfig, layout: Layout,
): { arguments: LaunchArgument[]; notes: string[] } {
  const { hybrid_override_pattern: pattern, mtp_hybrid_override_pattern: block } = config;
  const stages = stagesOf(layout, config);
  const even = stages.every(({ from, to }) => (to - from) * stages.length === pattern.length);
  return {
    arguments: [
      ["--num-layers", number(pattern.length)], ["--hybrid-override-pattern", pattern],
      ...(block === "" ? [] : [["--mtp-hybrid-override-pattern", block] as const]),
    ],
    notes: even ? [] : ["Older releases cut stages of equally many layers, which these are not: they cannot "
      + "load this cut."],
  };
}

function expertArguments(
  config: NemotronHConfig, layout: Layout, training: Recipe | null,
): LaunchArgument[] {
  const spec = [...layerSpecs(config), ...mtpSpecs(config)].find(({ kind }) => kind === "moe");
  if (spec?.kind !== "moe") return [];
  return [
    ["--num-experts", number(spec.n_routed_experts)], ["--moe-router-topk", number(spec.num_experts_per_tok)],
    ["--moe-ffn-hidden-size", number(spec.moe_intermediate_size)],
    ...(spec.shared_size > 0
      ? [["--moe-shared-expert-intermediate-size", number(spec.shared_size)] as const] : []),
    ...(config.shared_expert_gate ? [["--moe-shared-expert-gate"] as const] : []),
    ...(spec.moe_latent_size === null ? [] : [["--moe-latent-size", number(spec.moe_latent_size)] as const]),
    ["--moe-router-score-function", config.scoring_func], ["--moe-router-enable-expert-bias"],
    ...(training?.router_dtype === "bf16" ? [] : [["--moe-router-dtype", "fp32"] as const]),
    ["--moe-router-topk-scaling-factor", number(config.routed_scaling_factor)],
    ...(config.n_group > 1 ? [
      ["--moe-router-num-groups", number(config.n_group)] as const,
      ["--moe-router-group-topk", number(config.topk_group)] as const,
    ] : []),
    ...(training ? routerArguments(training)
      : [["--moe-router-load-balancing-type", "seq_aux_loss"] as const]),
    ["--moe-token-dispatcher-type", layout.dispatcher], ["--moe-grouped-gemm"], ["--moe-permute-fusion"],
  ];
}

function routerArguments(run: Recipe): LaunchArgument[] {
  const losses = ([
    ["seq_aux_loss", run.aux_coeff], ["aux_loss", run.aux_loss], ["global_aux_loss", run.global_aux_loss],
  ] as const).filter(([, coefficient]) => coefficient > 0);
  return [
    ["--moe-router-bias-update-rate", number(run.bias_rate)],
    ["--moe-router-load-balancing-type", ...(losses.length > 0 ? losses.map(([type]) => type) : ["none"])],
    ...(losses.length > 0
      ? [["--moe-aux-loss-coeff", ...losses.map(([, coefficient]) => number(coefficient))] as const] : []),
    ...(run.z_loss > 0 ? [["--moe-z-loss-coeff", number(run.z_loss)] as const] : []),
    ...(run.forced_balance ? [["--moe-router-force-load-balancing"] as const] : []),
    ...(run.router_jitter > 0 ? [["--moe-input-jitter-eps", number(run.router_jitter)] as const] : []),
    ...(run.capacity_factor > 0 ? [
      ["--moe-expert-capacity-factor", number(run.capacity_factor)] as const,
      ["--moe-token-drop-policy", run.drop_policy] as const,
      ...(run.pad_to_capacity ? [["--moe-pad-expert-input-to-capacity"] as const] : []),
    ] : []),
  ];
}

function mtpArguments(config: NemotronHConfig, training: Recipe | null): LaunchArgument[] {
  const depths = depthsOf(config, training);
  if (depths === 0) return [];
  return [
    ["--mtp-num-layers", number(depths)],
    ...(depths > 1 ? [["--mtp-use-repeated-layer"] as const] : []),
    ...(training ? [["--mtp-loss-scaling-factor", number(training.mtp_scale)] as const] : []),
  ];
}

function trainingArguments({ dp }: Layout, run: Recipe): LaunchArgument[] {
  const style: LaunchArgument[] = run.schedule === "wsd" ? [
    ["--lr-decay-style", "WSD"], ["--lr-wsd-decay-style", "linear"],
    ["--lr-wsd-decay-iters", number(run.decay)],
  ] : [["--lr-decay-style", run.schedule]];
  const sequences = run.batch * run.accumulate;
  return [
    ["--seq-length", number(run.seqlen)],
    // The same sequences in a step: those of the run's micro-batches, shared among the replicas.
    ["--micro-batch-size", number(sequences % (run.batch * dp) === 0 ? run.batch : 1)],
    ["--global-batch-size", number(sequences)],
    ["--train-iters", number(run.steps)], ["--lr", number(run.lr)], ["--min-lr", number(run.min_lr)],
    ...style, ["--lr-warmup-iters", number(run.warmup)], ["--lr-decay-iters", number(run.steps)],
    ["--optimizer", "adam"], ["--adam-beta1", number(run.beta1)], ["--adam-beta2", number(run.beta2)],
    ["--adam-eps", number(run.eps)], ["--weight-decay", number(run.weight_decay)],
    ["--clip-grad", number(run.clip)], ["--seed", number(run.seed)],
    ...(run.per_token ? [["--calculate-per-token-loss"] as const] : []),
    ...recomputeArguments(run.recompute),
    ...(PRECISIONS[run.precision] ?? []),
  ];
}

/** The other side knows no recomputation of a Mamba layer's inner part: that alone is left out. */
function recomputeArguments(text: string): LaunchArgument[] {
  const { layers, first, modules } = parseRecompute(text);
  if (layers > 0) {
    const [method, count] = first < Infinity ? ["block", first] : ["uniform", layers];
    return [
      ["--recompute-granularity", "full"], ["--recompute-method", method!],
      ["--recompute-num-layers", number(count as number)],
    ];
  }
  const names = [...modules].filter((name) => name !== "mamba");
  if (names.length === 0) return [];
  return [["--recompute-granularity", "selective"], ["--recompute-modules", ...names]];
}

/** The arguments as a shell script to be sourced: an array MEGATRON_ARGS. */
export function launchScript(launch: Launch): string {
  const quoted = (text: string) => (/^[\w./:=-]+$/.test(text) ? text : `'${text}'`);
  const line = (argument: LaunchArgument) => argument.map(quoted).join(" ");
  return [
    "#!/usr/bin/env bash",
    `# Megatron Core on ${launch.world} GPUs, layout ${launch.layout}.`,
    "#",
    "#   source megatron_args.sh",
    `#   torchrun --nproc-per-node ... --nnodes ... pretrain_mamba.py "\${MEGATRON_ARGS[@]}" \\`,
    "#     --load CONVERTED_FOLDER --save ... --data-path ... --tokenizer-type ...",
    "#",
    ...launch.notes.map((note) => `# ${note}`),
    `# Releases without --hybrid-layer-pattern: ${launch.older_releases.map(line).join(" ")}`,
    "MEGATRON_ARGS=(",
    ...launch.arguments.map((argument) => `  ${line(argument)}`),
    ")", "",
  ].join("\n");
}

/** The Python program that makes Megatron Core's pickled checkpoint of the exported files. */
export const CONVERT_SCRIPT = `#!/usr/bin/env python3
"""Turns a folder that "krait export megatron" wrote into a checkpoint that Megatron Core loads.

  python convert_to_torch.py OUT
  ... --load OUT --ckpt-format torch [--ckpt-convert-format torch_dist --ckpt-convert-save OUT_DIST]

Needs torch and safetensors, no GPU and no Megatron. OUT gets one file for each model-parallel rank,
release/mp_rank_TP[_PPP][_EEE]/model_optim_rng.pt, and latest_checkpointed_iteration.txt.
"""
import argparse
import json
import os
import sys

import torch
from safetensors.torch import load_file


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", help="folder to write; must not exist")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"],
                        help="format of matrices; default: as exported. What is f32 in Megatron stays f32")
    parser.add_argument("--conv1d-underscore", action="store_true",
                        help="releases that name the convolution conv1d_weight and conv1d_bias")
    options = parser.parse_args()
    here = os.path.dirname(os.path.abspath(__file__))
    with open(os.path.join(here, "${MEGATRON_INDEX}"), encoding="utf-8") as file:
        index = json.load(file)
    if os.path.exists(options.out):
        sys.exit(f"{options.out} exists already")
    # It gets its name when it is whole; what an interrupted run left is written over.
    unfinished = options.out.rstrip("/") + ".unfinished"

    for rank in index["ranks"]:
        chunks = {}
        for name, tensor in load_file(os.path.join(here, rank["file"])).items():
            chunk = "model"
            head, _, rest = name.partition(".")
            if head.startswith("model") and head[5:].isdigit():
                chunk, name = head, rest
            if options.conv1d_underscore:
                name = name.replace(".conv1d.", ".conv1d_")
            keeps_f32 = name.endswith((".A_log", ".D", ".expert_bias"))
            if keeps_f32:
                tensor = tensor.float()
            elif options.dtype:
                tensor = tensor.to(getattr(torch, options.dtype))
            chunks.setdefault(chunk, {})[name] = tensor
        state = {"checkpoint_version": 3.0, "iteration": 0, **chunks}
        folder = os.path.join(unfinished, "release", rank["folder"])
        os.makedirs(folder, exist_ok=True)
        torch.save(state, os.path.join(folder, "model_optim_rng.pt"))
        print(rank["folder"])
    with open(os.path.join(unfinished, "latest_checkpointed_iteration.txt"), "w", encoding="utf-8") as file:
        file.write("release")
    os.rename(unfinished, options.out)


if __name__ == "__main__":
    main()
`;
