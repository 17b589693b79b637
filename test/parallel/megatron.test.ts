import { mkdtempSync, readdirSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { beforeAll, describe, expect, test } from "vitest";
import { writeFolder } from "../../src/io/files.node.ts";
import { memoryFolder } from "../../src/io/files.ts";
import { encodeSafetensors, openSafetensors, openTensors } from "../../src/io/safetensors.ts";
import type { TensorEntry, TensorReader } from "../../src/io/safetensors.ts";
import { listCheckpointTensors } from "../../src/models/checkpoint_names.ts";
import { parseConfig, serialiseConfig } from "../../src/models/config.ts";
import type { NemotronHConfig } from "../../src/models/config.ts";
import { preset } from "../../src/models/presets.ts";
import { parseLayout } from "../../src/parallel/layout.ts";
import {
  checkMegatron, megatronFiles, megatronRanks, openMegatron, packQkv, unpackQkv,
} from "../../src/parallel/megatron.ts";
import { launchOf, launchScript } from "../../src/train/megatron_launch.ts";
import type { Recipe } from "../../src/train/recipe.ts";
import { FormatError, UsageError } from "../../src/tensor/errors.ts";
import { sizeOf } from "../../src/tensor/ndarray.ts";
import { RECIPE } from "../../src/train/recipe.ts";

const KEYS = {
  hybrid_override_pattern: "ME*-ME", vocab_size: 64, hidden_size: 8, num_attention_heads: 8,
  num_key_value_heads: 2, head_dim: 4, mamba_num_heads: 8, mamba_head_dim: 2, ssm_state_size: 3, n_groups: 4,
  chunk_size: 4, intermediate_size: 16, n_routed_experts: 8, num_experts_per_tok: 3,
  moe_intermediate_size: 12, moe_shared_expert_intermediate_size: 8, moe_latent_size: 4,
  shared_expert_gate: true, routed_scaling_factor: 2.5, num_nextn_predict_layers: 1,
  mtp_hybrid_override_pattern: "*E",
};
const config = parseConfig(KEYS);

/** A checkpoint of values that are all different; experts in bf16, all else in f32, with NaN. */
function checkpoint(of: NemotronHConfig): TensorEntry[] {
  let next = 0x3f800000;
  return listCheckpointTensors(of).map(({ name, shape, expert }) => {
    const count = sizeOf(shape);
    if (expert !== null) {
      const bits = Uint16Array.from({ length: count }, () => next++ & 0xffff);
      return { name, dtype: "BF16", shape, bytes: new Uint8Array(bits.buffer) };
    }
    const bits = Uint32Array.from({ length: count }, (_, i) => (i === 0 ? 0x7fc00001 : next++));
    return { name, dtype: "F32", shape, bytes: new Uint8Array(bits.buffer) };
  });
}

let entries: TensorEntry[];
let reader: TensorReader;
beforeAll(async () => {
  entries = checkpoint(config);
  reader = await openTensors(
    memoryFolder("model", { "model.safetensors": await encodeSafetensors(entries) }));
});

async function collect(content: string | AsyncIterable<Uint8Array>): Promise<Uint8Array> {
  if (typeof content === "string") return new TextEncoder().encode(content);
  const pieces: Uint8Array[] = [];
  for await (const piece of content) pieces.push(piece);
  return Uint8Array.from(Buffer.concat(pieces));
}

async function exported(text: string, from = reader, of = config): Promise<Record<string, Uint8Array>> {
  const files: Record<string, Uint8Array> = {
    "config.json": new TextEncoder().encode(serialiseConfig(of)),
  };
  for (const [name, content] of Object.entries(megatronFiles(of, from, parseLayout(text), "model"))) {
    files[name] = await collect(content);
  }
  return files;
}

async function tensorsOf(file: Uint8Array): Promise<TensorReader> {
  return await openSafetensors((await memoryFolder("out", { file }).open("file"))!);
}

const LAYOUTS = [
  "", "tp=2", "tp=4", "pp=2", "pp=3,vpp=2", "ep=4,dp=4", "tp=2,ep=4,dp=2", "tp=2,cp=2,dp=2,ep=8",
  "tp=2,etp=2,dp=4,ep=4", "tp=4,etp=2,dp=2,ep=4", "tp=2,pp=2,dp=2,ep=4", "pp=2,dp=2,ep=2,stages=Et*2|t*4mL",
  "tp=2,pp=2,vpp=2,dp=2,ep=2,stages=Et|t*2|t*2|tmL",
];

describe("there and back", () => {
  test.each(LAYOUTS)("%s: every tensor has the same bits", async (text) => {
    const folder = await openMegatron(memoryFolder("out", await exported(text)));
    expect(folder.entries.map(({ name }) => name)).toEqual(entries.map(({ name }) => name));
    for (const [i, { name, dtype, shape, bytes }] of folder.entries.entries()) {
      const original = entries[i]!;
      expect({ name, dtype, shape }).toEqual(
        { name: original.name, dtype: original.dtype, shape: original.shape });
      const back = typeof bytes === "function" ? await bytes() : bytes;
      expect(Buffer.compare(back, original.bytes as Uint8Array), name).toBe(0);
    }
    await folder.close();
  });

  test("stacked experts are read expert by expert", async () => {
    const stacked = entries.filter(({ name }) => !/experts\.\d/.test(name));
    for (const { name } of entries) {
      const [, path, leaf] = /^(.*\.experts)\.0\.(\w+)\.weight$/.exec(name) ?? [];
      if (path === undefined) continue;
      const parts = entries.filter((each) => each.name.startsWith(`${path}.`) && each.name.includes(leaf!));
      stacked.push({
        name: `${path}.${leaf!}`, dtype: "BF16", shape: [8, ...parts[0]!.shape],
        bytes: Buffer.concat(parts.map(({ bytes }) => bytes as Uint8Array)),
      });
    }
    const whole = await openTensors(
      memoryFolder("model", { "model.safetensors": await encodeSafetensors(stacked) }));
    expect(await exported("ep=4,dp=4", whole)).toEqual(await exported("ep=4,dp=4"));
  });
});

describe("what a rank's file holds", () => {
  test("the names and shapes of Megatron Core, all of them", async () => {
    const files = await exported("tp=2,pp=2,dp=2,ep=4,stages=ME*|-ME/*E");
    expect(Object.keys(files).toSorted()).toEqual([
      "config.json", "index.json", ...[
        "00_000_000", "00_000_002", "00_001_000", "00_001_002", "01_000_001", "01_000_003", "01_001_001",
        "01_001_003",
      ].map((name) => `mp_rank_${name}.safetensors`),
    ]);
    const shapes = (found: TensorReader) => Object.fromEntries(
      [...found.tensors.values()].map(({ name, shape }) => [name, shape.join("x")]));
    const moe = (at: string) => ({
      [`${at}.pre_mlp_layernorm.weight`]: "8", [`${at}.mlp.router.weight`]: "8x8",
      [`${at}.mlp.router.expert_bias`]: "8", [`${at}.mlp.fc1_latent_proj.weight`]: "4x8",
      [`${at}.mlp.fc2_latent_proj.weight`]: "8x4", [`${at}.mlp.experts.linear_fc1.weight0`]: "12x4",
      [`${at}.mlp.experts.linear_fc1.weight1`]: "12x4", [`${at}.mlp.experts.linear_fc2.weight0`]: "4x12",
      [`${at}.mlp.experts.linear_fc2.weight1`]: "4x12",
      [`${at}.mlp.shared_experts.linear_fc1.weight`]: "4x8",
      [`${at}.mlp.shared_experts.linear_fc2.weight`]: "8x4", [`${at}.mlp.shared_experts.gate_weight`]: "1x8",
    });
    const mamba = (at: string) => ({
      [`${at}.mixer.in_proj.layer_norm_weight`]: "8", [`${at}.mixer.in_proj.weight`]: "32x8",
      [`${at}.mixer.conv1d.weight`]: "20x1x4", [`${at}.mixer.conv1d.bias`]: "20",
      [`${at}.mixer.A_log`]: "4", [`${at}.mixer.D`]: "4", [`${at}.mixer.dt_bias`]: "4",
      [`${at}.mixer.norm.weight`]: "8", [`${at}.mixer.out_proj.weight`]: "8x8",
    });
    const attention = (at: string) => ({
      [`${at}.self_attention.linear_qkv.layer_norm_weight`]: "8",
      [`${at}.self_attention.linear_qkv.weight`]: "24x8", [`${at}.self_attention.linear_proj.weight`]: "8x16",
    });
    expect(shapes(await tensorsOf(files["mp_rank_01_000_001.safetensors"]!))).toEqual({
      "embedding.word_embeddings.weight": "32x8", ...mamba("decoder.layers.0"), ...moe("decoder.layers.1"),
      ...attention("decoder.layers.2"),
    });
    expect(shapes(await tensorsOf(files["mp_rank_00_001_002.safetensors"]!))).toEqual({
      "decoder.layers.0.mlp.linear_fc1.layer_norm_weight": "8",
      "decoder.layers.0.mlp.linear_fc1.weight": "8x8", "decoder.layers.0.mlp.linear_fc2.weight": "8x8",
      ...mamba("decoder.layers.1"), ...moe("decoder.layers.2"), "decoder.final_norm.weight": "8",
      "embedding.word_embeddings.weight": "32x8", "output_layer.weight": "32x8",
      "mtp.layers.0.enorm.weight": "8", "mtp.layers.0.hnorm.weight": "8",
      "mtp.layers.0.eh_proj.weight": "4x16", "mtp.layers.0.final_layernorm.weight": "8",
      ...attention("mtp.layers.0.mtp_model_layer.layers.0"), ...moe("mtp.layers.0.mtp_model_layer.layers.1"),
    });
  });

  test("chunks of an interleaved pipeline as model0, model1, numbered within the chunk", async () => {
    const files = await exported("pp=2,vpp=2,stages=M|E*|-M|E/*E");
    const names = async (file: string) => [...(await tensorsOf(files[file]!)).tensors.keys()];
    expect((await names("mp_rank_00_000.safetensors")).toSorted()).toEqual(expect.arrayContaining([
      "model0.embedding.word_embeddings.weight", "model0.decoder.layers.0.mixer.in_proj.weight",
      "model1.decoder.layers.0.mlp.linear_fc1.weight", "model1.decoder.layers.1.mixer.in_proj.weight",
    ]));
    expect(await names("mp_rank_00_001.safetensors")).toContain(
      "model1.mtp.layers.0.mtp_model_layer.layers.1.mlp.router.weight");
  });

  test("experts are those of the ep rank, with local numbers", async () => {
    const files = await exported("ep=4,dp=4");
    const file = await tensorsOf(files["mp_rank_00_002.safetensors"]!);
    const bytes = await file.read("decoder.layers.1.mlp.experts.linear_fc1.weight1");
    const expert5 = entries.find(({ name }) => name === "backbone.layers.1.mixer.experts.5.up_proj.weight")!;
    expect(Buffer.compare(bytes, expert5.bytes as Uint8Array)).toBe(0);
  });

  test("queries, keys and values are packed by groups", () => {
    const rows = (from: number, to: number) =>
      Float32Array.from({ length: (to - from) * 8 }, (_, i) => from + Math.floor(i / 8));
    const [q, k, v] = [rows(0, 32), rows(100, 108), rows(200, 208)];
    const packed = packQkv(config, [q, k, v]);
    const order = [...packed].filter((_, i) => i % 8 === 0);
    const range = (from: number, count: number) => Array.from({ length: count }, (_, i) => from + i);
    expect(order).toEqual([
      ...range(0, 16), ...range(100, 4), ...range(200, 4),
      ...range(16, 16), ...range(104, 4), ...range(204, 4),
    ]);
    expect(unpackQkv(config, packed)).toEqual([q, k, v]);
  });
});

describe("what cannot be", () => {
  test.each<[Record<string, unknown>, string, string]>([
    [{ use_bias: true }, "tp=2", "needs use_bias to be false, found true"],
    [{ attention_bias: true }, "tp=2", "needs attention_bias to be false, found true"],
    [{ use_conv_bias: false }, "", "needs use_conv_bias to be true, found false"],
    [{ conv_kernel: 3 }, "", "needs conv_kernel to be 4, found 3"],
    [{ hybrid_override_pattern: "-M-", intermediate_size: [16, 24], num_nextn_predict_layers: 0 }, "",
      "needs all MLP layers to be alike, found 2 kinds"],
    [{ norm_topk_prob: false }, "", "needs norm_topk_prob to be true, found false"],
    [{ scoring_func: "softmax" }, "", "needs scoring_func to be sigmoid or sqrtsoftplus, found softmax"],
    [{ router_choice: "logits" }, "", "needs router_choice to be score, found logits"],
    [{ n_group: 2, topk_group: 2 }, "", "group_best to be num_experts_per_tok / topk_group = 1.5, found 2"],
    [{}, "tp=8", "tp divides the Mamba groups"],
    [{}, "pp=3,stages=Et*3|t*3m|L", "needs the prediction block to be in the stage of the head"],
    [{}, "ep=16,dp=16", "ep divides the experts"],
    [{}, "dp=2,etp=2", "expected an etp that divides tp=1, found etp=2"],
  ])("%o under %s", (keys, text, message) => {
    const check = () => checkMegatron(parseConfig({ ...KEYS, ...keys }), parseLayout(text));
    expect(check).toThrow(UsageError);
    expect(check).toThrow(message);
  });

  test("a checkpoint of other numbers, of mixed formats in one matrix, or without a tensor", async () => {
    const open = async (change: (entry: TensorEntry) => TensorEntry | null) => {
      const changed = entries.map(change).filter((entry) => entry !== null);
      return await openTensors(
        memoryFolder("model", { "model.safetensors": await encodeSafetensors(changed) }));
    };
    const as = (pattern: RegExp, dtype: "F64" | "BF16") => (entry: TensorEntry): TensorEntry => {
      if (!pattern.test(entry.name)) return entry;
      const size = sizeOf(entry.shape) * (dtype === "F64" ? 8 : 2);
      return { ...entry, dtype, bytes: new Uint8Array(size) };
    };
    const make = (from: TensorReader) => () => megatronFiles(config, from, parseLayout(""), "model");
    expect(make(await open(as(/^lm_head/, "F64")))).toThrow(
      new FormatError("model: tensor \"lm_head.weight\": expected F32, BF16 or F16, found F64"));
    expect(make(await open(as(/layers\.2\.mixer\.k_proj/, "BF16")))).toThrow(
      "tensor \"backbone.layers.2.mixer.k_proj.weight\": expected F32 as "
      + "\"backbone.layers.2.mixer.q_proj.weight\", found BF16");
    expect(make(await open((entry) => (entry.name === "lm_head.weight" ? null : entry)))).toThrow(
      "tensor \"lm_head.weight\": expected [64, 8], found none");
  });

  test("a folder that lacks a file, or holds another layout's", async () => {
    const files = await exported("tp=2");
    const lacking = Object.fromEntries(Object.entries(files).filter(([name]) => !name.includes("01")));
    await expect(openMegatron(memoryFolder("out", lacking))).rejects.toThrow(
      new FormatError("out: expected mp_rank_01.safetensors, found no file"));
    const other = { ...files, ...await exported("tp=4"), "index.json": files["index.json"]! };
    await expect(openMegatron(memoryFolder("out", other))).rejects.toThrow(
      /mp_rank_00.safetensors: tensor "embedding.word_embeddings.*": expected \[32, 8\], found \[16, 8\]/);
    await expect(openMegatron(memoryFolder("out", { "index.json": new TextEncoder().encode("{}") })))
      .rejects.toThrow("expected format \"krait-megatron-export\" version 1, found something else");
  });

  test("a disk or a source that fails half-way leaves nothing", async () => {
    const parent = mkdtempSync(join(tmpdir(), "krait-"));
    try {
      let reads = 0;
      const failing = Object.assign(Object.create(reader) as TensorReader, {
        read: async (name: string, range?: { start: number; count: number }) => {
          if (++reads > 20) throw new Error("the disk is full");
          return await reader.read(name, range);
        },
      });
      const files = megatronFiles(config, failing, parseLayout("tp=2"), "model");
      await expect(writeFolder(join(parent, "out"), files)).rejects.toThrow("the disk is full");
      expect(readdirSync(parent)).toEqual([]);
    } finally {
      rmSync(parent, { recursive: true });
    }
  });
});

describe("launch arguments", () => {
  const training: Recipe = {
    ...RECIPE, steps: 100, batch: 4, accumulate: 2, seqlen: 32, warmup: 7, decay: 33, mtp_depths: 2,
    precision: "mxfp8",
  };
  const valueOf = (text: string, name: string, run: Recipe | null = training) =>
    launchOf(config, parseLayout(text), run).arguments.find(([each]) => each === name)?.slice(1).join(" ");

  test("say the layout, with the stages that the files have", () => {
    const text = "tp=2,cp=2,pp=2,dp=2,ep=4,dispatch=flex,stages=ME*|-ME/*E";
    expect(valueOf(text, "--tensor-model-parallel-size")).toBe("2");
    expect(valueOf(text, "--context-parallel-size")).toBe("2");
    expect(valueOf(text, "--pipeline-model-parallel-size")).toBe("2");
    expect(valueOf(text, "--expert-model-parallel-size")).toBe("4");
    expect(valueOf(text, "--expert-tensor-parallel-size")).toBe("1");
    expect(valueOf(text, "--sequence-parallel")).toBe("");
    expect(valueOf("dp=2", "--sequence-parallel")).toBeUndefined();
    expect(valueOf(text, "--cp-comm-type")).toBe("p2p");
    expect(valueOf("tp=1,cp=4,cp_kind=hierarchical", "--cp-comm-type")).toBe("a2a+p2p");
    expect(valueOf("tp=1,cp=4,cp_kind=hierarchical", "--hierarchical-context-parallel-sizes")).toBe("2 2");
    expect(valueOf(text, "--moe-token-dispatcher-type")).toBe("flex");
    for (const name of ["--overlap-moe-expert-parallel-comm", "--delay-wgrad-compute"]) {
      expect(valueOf("dp=2,ep=2,overlap=on", name)).toBe("");
      expect(valueOf("dp=2,ep=2", name)).toBeUndefined();
    }
    expect(valueOf(text, "--hybrid-layer-pattern", null)).toBe("ME*|-ME/*E");
    expect(launchOf(config, parseLayout(text), null).world).toBe(16);
    expect(launchOf(config, parseLayout(text), null).older_releases).toEqual(
      [["--num-layers", "6"], ["--hybrid-override-pattern", "ME*-ME"],
        ["--mtp-hybrid-override-pattern", "*E"]]);
    const uneven = launchOf(config, parseLayout("pp=2,stages=Et|t*5mL"), null);
    expect(uneven.notes.join()).toContain("Older releases cut stages of equally many layers");
  });

  test.each([
    ["off", []], ["full:2", ["full", "uniform 2"]], ["block:3", ["full", "block 3"]],
    ["core_attn,mamba,moe_act", ["selective", "core_attn moe_act"]],
  ])("say what is recomputed: %s", (recompute, expected) => {
    const value = (name: string) => valueOf("dp=2", `--recompute-${name}`, { ...training, recompute });
    const method = value("method");
    const found = [value("granularity"), method && `${method} ${value("num-layers")}`, value("modules")];
    expect(found.filter((value) => value !== undefined)).toEqual(expected);
  });

  test("say the model", () => {
    const model = preset("nemotron-3-super-120b-a12b");
    const found = new Map(launchOf(model, parseLayout("tp=2,dp=32,ep=64"), null).arguments.map(
      ([name, ...values]) => [name, values.join(" ")]));
    // As the scripts for this model have them.
    expect(Object.fromEntries(found)).toMatchObject({
      "--hidden-size": "4096", "--num-attention-heads": "32", "--num-query-groups": "2",
      "--kv-channels": "128",
      "--mamba-num-heads": "128", "--mamba-head-dim": "64", "--mamba-state-dim": "128",
      "--mamba-num-groups": "8", "--num-experts": "512", "--moe-router-topk": "22",
      "--moe-latent-size": "1024", "--moe-shared-expert-intermediate-size": "5376",
      "--moe-ffn-hidden-size": "2688", "--moe-router-topk-scaling-factor": "5",
      "--moe-router-score-function": "sigmoid", "--moe-router-enable-expert-bias": "", "--squared-relu": "",
      "--position-embedding-type": "none", "--normalization": "RMSNorm", "--mtp-num-layers": "1",
      "--make-vocab-size-divisible-by": "128",
      "--hybrid-layer-pattern": `${model.hybrid_override_pattern}/*E`,
    });
    expect(found.has("--lr")).toBe(false);
    expect(valueOf("tp=2", "--make-vocab-size-divisible-by")).toBe("32");
  });

  test("say the run: batch, schedule, optimiser, prediction depths, precision", () => {
    expect(valueOf("", "--global-batch-size")).toBe("8");
    expect(["dp=2", "dp=4"].map((text) => valueOf(text, "--micro-batch-size"))).toEqual(["4", "1"]);
    expect(valueOf("", "--lr-decay-style")).toBe("WSD");
    expect(valueOf("", "--lr-wsd-decay-iters")).toBe("33");
    expect(valueOf("", "--lr-warmup-iters")).toBe("7");
    expect(valueOf("", "--adam-beta2")).toBe("0.95");
    expect(valueOf("", "--mtp-num-layers")).toBe("2");
    expect(valueOf("", "--mtp-use-repeated-layer")).toBe("");
    expect(valueOf("", "--fp8-recipe")).toBe("mxfp8");
    expect(valueOf("", "--calculate-per-token-loss")).toBeUndefined();
    expect(valueOf("", "--moe-router-load-balancing-type")).toBe("seq_aux_loss");
    expect(valueOf("", "--moe-expert-capacity-factor")).toBeUndefined();
    expect(valueOf("", "--moe-router-force-load-balancing")).toBeUndefined();
    expect(valueOf("", "--moe-router-force-load-balancing", { ...training, forced_balance: true })).toBe("");
    expect(valueOf("", "--moe-shared-expert-gate")).toBe("");
    const dropping: Recipe = {
      ...training, per_token: true, aux_coeff: 0.001, aux_loss: 0.01, capacity_factor: 1.25,
      drop_policy: "position", pad_to_capacity: true, bias_update: "quantile",
    };
    expect(valueOf("", "--calculate-per-token-loss", dropping)).toBe("");
    expect(valueOf("", "--moe-router-load-balancing-type", dropping)).toBe("seq_aux_loss aux_loss");
    expect(valueOf("", "--moe-aux-loss-coeff", dropping)).toBe("0.001 0.01");
    expect(valueOf("", "--moe-expert-capacity-factor", dropping)).toBe("1.25");
    expect(valueOf("", "--moe-token-drop-policy", dropping)).toBe("position");
    expect(valueOf("", "--moe-pad-expert-input-to-capacity", dropping)).toBe("");
    expect(launchOf(config, parseLayout(""), dropping).notes.join()).toContain("by quantiles");
    expect(launchOf(config, parseLayout("dp=3"), training).notes.join()).toContain(
      "The run's 8 sequences a step do not divide among dp=3 replicas");
  });

  test("as a script have one argument a line, with patterns quoted", () => {
    const script = launchScript(launchOf(config, parseLayout("pp=2,stages=ME*|-ME/*E"), training));
    expect(script).toContain("\nMEGATRON_ARGS=(\n  --tensor-model-parallel-size 1\n");
    expect(script).toContain("  --hybrid-layer-pattern 'ME*|-ME/*E/*E'\n");
    expect(script).toContain("pattern: --num-layers 6 --hybrid-override-pattern 'ME*-ME'");
  });
});

test("ranks are named as Megatron Core names its files", () => {
  const names = (text: string) => megatronRanks(parseLayout(text)).map(({ folder }) => folder);
  expect(names("tp=2")).toEqual(["mp_rank_00", "mp_rank_01"]);
  expect(names("tp=2,pp=2").at(-1)).toBe("mp_rank_01_001");
  expect(names("dp=2,ep=2")).toEqual(["mp_rank_00_000", "mp_rank_00_001"]);
  // Folded over tp, a tensor rank meets only some expert ranks.
  expect(names("tp=2,dp=2,ep=4")).toEqual(
    ["mp_rank_00_000", "mp_rank_00_002", "mp_rank_01_001", "mp_rank_01_003"]);
});
