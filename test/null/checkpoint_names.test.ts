import { readdirSync } from "node:fs";
import { describe, expect, test } from "vitest";
import { openFolder } from "../../src/io/files.node.ts";
import { readAll } from "../../src/io/files.ts";
import { openTensors } from "../../src/io/safetensors.ts";
import { canonicalName, checkTensors, listCheckpointTensors, resolveTensors } from
  "../../src/models/checkpoint_names.ts";
import type { FoundTensor } from "../../src/models/checkpoint_names.ts";
import { parseConfig, withoutMtp } from "../../src/models/config.ts";
import { FormatError } from "../../src/tensor/errors.ts";

const golden = new URL("../fixtures/golden/", import.meta.url).pathname;
const tiny = parseConfig({
  hybrid_override_pattern: "M*-ME", vocab_size: 260, hidden_size: 128, num_attention_heads: 4,
    num_key_value_heads: 2,
  head_dim: 32, mamba_num_heads: 8, mamba_head_dim: 32, ssm_state_size: 32, n_groups: 2,
    intermediate_size: 256,
  n_routed_experts: 8, num_experts_per_tok: 2, moe_intermediate_size: 64,
    moe_shared_expert_intermediate_size: 128,
  moe_latent_size: 64, num_nextn_predict_layers: 1,
});

/** What a checkpoint of that model holds, with names changed and tensors added or taken away. */
function found(rename: (name: string) => string | null = (name) => name): Map<string, FoundTensor> {
  const map = new Map<string, FoundTensor>();
  for (const { name, shape } of listCheckpointTensors(tiny)) {
    const renamed = rename(name);
    if (renamed !== null) map.set(renamed, { dtype: "BF16", shape });
  }
  return map;
}

describe("checkpoints written by other programs", () => {
  test.each(readdirSync(golden))("%s: every tensor is found, and there is no other", async (name) => {
    const folder = openFolder(golden + name);
    const file = (await folder.open("config.json"))!;
    const config = parseConfig(await readAll(file, 1e6));
    await file.close();
    const reader = await openTensors(folder);
    const placements = resolveTensors(config, reader.tensors, { what: name });
    expect(placements.flatMap(({ tensors }) => tensors).length).toBe(reader.tensors.size);
    expect(new Set(listCheckpointTensors(config).map((tensor) => tensor.name))).toEqual(
      new Set(reader.tensors.keys()),
    );
    await reader.close();
  });
});

describe("names", () => {
  test.each([
    ["model.layers.3.mixer.q_proj.weight", "backbone.layers.3.mixer.q_proj.weight"],
    ["language_model.backbone.norm_f.weight", "backbone.norm_f.weight"],
    ["model.language_model.lm_head.weight", "lm_head.weight"],
    ["language_model.model.norm_f.weight", "backbone.norm_f.weight"],
    ["model.mtp.layers.0.enorm.weight", "mtp.layers.0.enorm.weight"],
    ["model.backbone.norm_f.weight", "backbone.norm_f.weight"],
    ["backbone.embedding.weight", "backbone.embeddings.weight"],
    ["model.embed_tokens.weight", "backbone.embeddings.weight"],
    ["backbone.layers.0.mixer.in_proj.weight_packed", "backbone.layers.0.mixer.in_proj.weight"],
    ["backbone.layers.1.mixer.experts.up_proj", "backbone.layers.1.mixer.experts.up_proj"],
    ["lm_head.weight", "lm_head.weight"],
  ])("%s is %s", (name, canonical) => {
    expect(canonicalName(name)).toBe(canonical);
  });

  test("prefixes of other programs", () => {
    const plain = resolveTensors(tiny, found());
    for (const prefix of ["model.", "language_model.backbone.", "model.language_model.backbone."]) {
      const rename = (name: string) => name.replace(/^backbone\./, prefix);
      const nested = prefix.includes("language_model");
      const outside = nested ? "language_model." : "";
      const all = found((name) => (name.startsWith("backbone.") ? rename(name) : outside + name));
      // Whatever else a multimodal checkpoint holds is none of our business.
      if (nested) all.set("vision_model.patch.weight", { dtype: "BF16", shape: [3] });
      const placements = resolveTensors(tiny, all);
      expect(placements.map(({ parameter }) => parameter)).toEqual(plain.map(({ parameter }) => parameter));
      expect(placements[0]!.tensors[0]).toContain("model.");
    }
  });

  test("experts one by one, in order, or stacked", () => {
    const name = "backbone.layers.4.mixer.experts.up_proj";
    const single = resolveTensors(tiny, found()).find(({ parameter }) => parameter.name === name)!;
    expect(single).toMatchObject(
      { from: "experts", parameter: { shape: [8, 64, 64], kind: "expert", layer: 4 } },
    );
    const expected = Array.from({ length: 8 }, (_,
      i) => `backbone.layers.4.mixer.experts.${i}.up_proj.weight`);
    expect(single.tensors).toEqual(expected);
    const stacked = found((tensor) => (/^backbone.*experts\.\d+\.up_proj/.test(tensor) ? null : tensor));
    stacked.set(name, { dtype: "F32", shape: [8, 64, 64] });
    const whole = resolveTensors(tiny, stacked).find(({ parameter }) => parameter.name === name)!;
    expect(whole).toMatchObject({ from: "whole", tensors: [name] });
  });

  test("quantised weights with their scales", () => {
    const name = "backbone.layers.0.mixer.in_proj.weight";
    const all = found();
    const [rows, columns] = all.get(name)!.shape as [number, number];
    all.set(name, { dtype: "U8", shape: [rows, columns / 2] });
    for (const suffix of ["_scale", "_scale_2"]) all.set(name + suffix, { dtype: "F32", shape: [] });
    all.set("backbone.layers.0.mixer.in_proj.input_scale", { dtype: "F32", shape: [] });
    all.set("backbone.layers.1.mixer.k_proj.k_scale", { dtype: "F32", shape: [] });
    expect(resolveTensors(tiny, all).length).toBe(resolveTensors(tiny, found()).length);
    all.set(name, { dtype: "U8", shape: [rows, columns] });
    expect(() => resolveTensors(tiny, all)).toThrow(
      `tensor "${name}": expected U8 [${rows}, ${columns / 2}], found U8 [${rows}, ${columns}]`,
    );
    all.set("backbone.norm_f.weight", { dtype: "U8", shape: [128] });
    expect(checkTensors(tiny, all).problems[1]).toBe(
      'tensor "backbone.norm_f.weight": expected floats in [128], found U8 [128]',
    );
  });
});

describe("what does not fit", () => {
  const fails = (all: Map<string, FoundTensor>, message: RegExp, config = tiny) => {
    expect(() => resolveTensors(config, all, { what: "my model" })).toThrow(FormatError);
    expect(() => resolveTensors(config, all, { what: "my model" })).toThrow(message);
  };

  test("a missing tensor", () => {
    fails(found((name) => (name === "lm_head.weight" ? null : name)),
      /^my model: tensor "lm_head\.weight": expected \[260, 128\], found none$/);
    fails(found((name) => (name.includes("experts.3.") ? null : name)),
      /^my model: tensor "backbone\.layers\.4\.mixer\.experts\.3\.up_proj\.weight".* \(and 3 more\)$/);
  });

  test("a tensor of another shape", () => {
    const all = found();
    all.set("backbone.norm_f.weight", { dtype: "F32", shape: [64] });
    fails(all, /^my model: tensor "backbone\.norm_f\.weight": expected F32 \[128\], found F32 \[64\]$/);
  });

  test("a tensor too many, unless that is fine", () => {
    const all = found();
    all.set("backbone.layers.9.norm.weight", { dtype: "F32", shape: [128] });
    fails(all, /^my model: tensor "backbone\.layers\.9\.norm\.weight": expected no tensor of that name/);
    expect(resolveTensors(tiny, all, { extra: "ignore" }).length).toBe(resolveTensors(tiny, found()).length);
    const scale = found();
    scale.set("backbone.layers.9.mixer.in_proj.weight_scale", { dtype: "F32", shape: [] });
    fails(scale, /in_proj\.weight_scale": expected no tensor/);
  });

  test("a prediction block that the configuration does not have", () => {
    fails(found(), /tensor "mtp\.layers\.0\.enorm\.weight": expected no tensor/, withoutMtp(tiny));
    expect(() => resolveTensors(withoutMtp(tiny), found(), { extra: "ignore" })).not.toThrow();
  });

  test("two tensors of one meaning", () => {
    const all = found();
    all.set("backbone.embedding.weight", { dtype: "F32", shape: [260, 128] });
    fails(all, /"backbone\.embedding\.weight": expected one of this meaning, found "backbone\.embeddings\./);
  });

  test("every problem is one sentence of a list", () => {
    const { problems } = checkTensors(tiny, new Map());
    expect(problems.length).toBe(listCheckpointTensors(tiny).length);
    expect(problems[0]).toBe('tensor "backbone.embeddings.weight": expected [260, 128], found none');
  });

  test("attention biases that the configuration asks for and the checkpoint lacks are zero", () => {
    const config = parseConfig({ hybrid_override_pattern: "*", attention_bias: true, vocab_size: 4,
      hidden_size: 2,
      num_attention_heads: 1, num_key_value_heads: 1, head_dim: 2 });
    const all = new Map<string, FoundTensor>();
    for (const { name, shape } of listCheckpointTensors(config)) {
      if (!name.endsWith("bias")) all.set(name, { dtype: "F32", shape });
    }
    const placements = resolveTensors(config, all);
    const zeros = placements.filter(({ from }) => from === "zeros").map(({ parameter }) => parameter.name);
    expect(zeros).toEqual(
      ["q", "k", "v", "o"].map((letter) => `backbone.layers.0.mixer.${letter}_proj.bias`),
    );
  });
});
