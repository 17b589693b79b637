/** A dense model and the mixture of experts made of it. */
import { mkdtempSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { expect, test } from "vitest";
import { openFolder, writeFolder } from "../../src/io/files.node.ts";
import { loadModel, modelFiles } from "../../src/models/checkpoint.ts";
import { listParameters } from "../../src/models/checkpoint_names.ts";
import { parseConfig } from "../../src/models/config.ts";
import { NemotronH } from "../../src/models/nemotron_h.ts";
import { createParameters, uploadWeights } from "../../src/models/parameters.ts";
import { preset } from "../../src/models/presets.ts";
import { type UpcycleOptions, upcycledConfig, upcycledValues } from "../../src/models/upcycle.ts";
import { scope } from "../../src/tensor/scope.ts";
import { krait } from "../cli/krait.ts";
import { Draw } from "../ops/suite.ts";
import { onEveryAdapter } from "../support/devices.ts";

const unit = preset("unit");
/** Two MLPs, and one in the prediction block. */
const DENSE = parseConfig({
  ...unit, hybrid_override_pattern: "M-*-", num_hidden_layers: 4, mtp_hybrid_override_pattern: "*-",
  initializer_range: 0.3, eos_token_id: 2, n_routed_experts: 8, time_step_limit: [0, 1e308],
});

await onEveryAdapter((device) => {
  const ids = Int32Array.from(new Draw(3).integers([2, 9], 0, DENSE.vocab_size).data);
  const targets = Int32Array.from(new Draw(4).integers([2, 9], 0, DENSE.vocab_size).data);

  async function lossOf(model: NemotronH): Promise<number> {
    const batch = {
      input_ids: device.tensor(ids, [2, 9], "i32"), targets: device.tensor(targets, [2, 9], "i32"),
      seq_idx: null,
    };
    const total = scope(() => model.loss({ ...batch, mtp: [batch] }, { mtp_scale: 0.5 }).total);
    const value = await total.item();
    for (const tensor of [total, batch.input_ids, batch.targets]) tensor.dispose();
    return value;
  }

  async function upcycled(dense: NemotronH, options: UpcycleOptions): Promise<NemotronH> {
    const config = upcycledConfig(dense.config, options);
    const values = new Map<string, Float32Array>();
    for (const parameter of listParameters(config)) {
      values.set(parameter.name, await upcycledValues(config, parameter, async (name) =>
        await dense.parameters.get(name)!.read() as Float32Array, options));
    }
    return new NemotronH(config, uploadWeights(device, config, values, "f32"));
  }

  test.each<UpcycleOptions>([
    { experts: 4, granularity: 1, topk: 2 }, { experts: 8, granularity: 2, topk: 4, seed: 9 },
    { experts: 12, granularity: 3, topk: 3 }, { experts: 8, granularity: 4, topk: 8 },
    { experts: 8, granularity: 2, topk: 2, score: "sigmoid" },
    { experts: 8, granularity: 2, topk: 4, score: "sqrtsoftplus" },
  ])("the first loss is that of the dense model: %j", async (options) => {
    const dense = new NemotronH(DENSE, createParameters(device, DENSE, 1));
    const sparse = await upcycled(dense, options);
    const [before, after] = [await lossOf(dense), await lossOf(sparse)];
    expect(Math.abs(after / before - 1)).toBeLessThan(1e-5);
    dense.dispose();
    sparse.dispose();
  });

  test("by softmax over all experts it is close, with a router near zero", async () => {
    const near = { ...DENSE, initializer_range: 0.05 };
    const dense = new NemotronH(near, createParameters(device, near, 1));
    const sparse = await upcycled(dense, { experts: 8, granularity: 2, topk: 4, score: "softmax" });
    const [before, after] = [await lossOf(dense), await lossOf(sparse)];
    expect(Math.abs(after / before - 1)).toBeLessThan(1e-2);
    expect(after).not.toBe(before);
    dense.dispose();
    sparse.dispose();
  });

  test("krait upcycle writes a folder that is read like any other", async () => {
    const folder = mkdtempSync(join(tmpdir(), "krait-"));
    try {
      const dense = new NemotronH(DENSE, createParameters(device, DENSE, 1));
      await writeFolder(join(folder, "dense"), { ...modelFiles(dense), "tokenizer_config.json": "{}" });
      const args = ["upcycle", "--model", join(folder, "dense"), "--topk", "2", "--granularity", "2"];
      const { code, stdout, stderr } = await krait(
        [...args, "--experts", "4", "--out", join(folder, "sparse"), "--json"]);
      expect(code, stderr).toBe(0);
      expect(JSON.parse(stdout)).toMatchObject({ experts: 4, width: 12, topk: 2, exact: true });
      const text = readFileSync(join(folder, "sparse/config.json"), "utf8");
      expect(JSON.parse(text)).toMatchObject({ scoring_func: "softmax_chosen", num_experts_per_tok: 2 });
      expect(readFileSync(join(folder, "sparse/tokenizer_config.json"), "utf8")).toBe("{}");
      const sparse = await loadModel(device, parseConfig(text), openFolder(join(folder, "sparse")));
      expect(Math.abs(await lossOf(sparse) / await lossOf(dense) - 1)).toBeLessThan(1e-5);
      sparse.dispose();
      dense.dispose();
      const refused = await krait([...args, "--experts", "3", "--out", join(folder, "odd")]);
      expect(refused.code).toBe(2);
      expect(refused.stderr).toContain("a multiple of the granularity 2, found 3");
    } finally {
      rmSync(folder, { recursive: true });
    }
  });
});

test.each<[string, Partial<typeof DENSE>, Partial<UpcycleOptions>, RegExp]>([
  ["experts", { hybrid_override_pattern: "M-*E" }, {}, /without experts, found some/],
  ["no MLP", { hybrid_override_pattern: "M*M*", mtp_hybrid_override_pattern: "" }, {},
    /MLP layers, found none/],
  ["biases", { mlp_bias: true }, {}, /without biases.*found some/],
  ["two widths", { intermediate_size: [24, 12], mtp_hybrid_override_pattern: "" }, {},
    /one width, found 24 and 12/],
  ["shards of a part", {}, { granularity: 5 }, /divides the width 24, found 5/],
  ["copies of a part", {}, { granularity: 3 }, /multiple of the granularity 3, found 8/],
  ["too many per token", {}, { topk: 9 }, /num_experts_per_tok: expected an integer from 1 to 8, found 9/],
  ["one per token", {}, { topk: 1 }, /at least 2 for scoring_func softmax_chosen/],
])("refused: %s", (_, model, options, message) => {
  const config = { ...DENSE, num_nextn_predict_layers: 0, ...model };
  expect(() => upcycledConfig(config, { experts: 8, granularity: 2, topk: 2, ...options })).toThrow(message);
});
