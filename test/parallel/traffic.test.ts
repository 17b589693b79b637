import { describe, expect, test } from "vitest";
import { countParameters } from "../../src/models/accounting.ts";
import { listParameters } from "../../src/models/checkpoint_names.ts";
import { parseConfig } from "../../src/models/config.ts";
import { preset } from "../../src/models/presets.ts";
import { holdingsOf } from "../../src/parallel/holdings.ts";
import { parseLayout } from "../../src/parallel/layout.ts";
import { placeOfStage, stagesOf } from "../../src/parallel/stages.ts";
import { expectedRanks, predictTraffic, totalBytes } from "../../src/parallel/traffic.ts";
import type { TrafficOptions, TrafficRow } from "../../src/parallel/traffic.ts";
import { sizeOf } from "../../src/tensor/ndarray.ts";

const H = 24;
const config = (pattern: string, keys: Readonly<Record<string, unknown>> = {}) => parseConfig({
  hybrid_override_pattern: pattern, vocab_size: 48, hidden_size: H, num_attention_heads: 12,
  num_key_value_heads: 4, head_dim: 8, mamba_num_heads: 8, mamba_head_dim: 4, ssm_state_size: 6, n_groups: 2,
  intermediate_size: 24, n_routed_experts: 8, num_experts_per_tok: 3, moe_intermediate_size: 16,
  moe_shared_expert_intermediate_size: 0, ...keys,
});
const SIZES = { batch: 2, seqlen: 32, micro_batches: 3 };
/** Tokens of a micro-batch. */
const T = 64;

function rowsOf(text: string, model: ReturnType<typeof config>, options: TrafficOptions = {}) {
  return predictTraffic(parseLayout(text), model, SIZES, options);
}
/** "what, kind, pass: calls x bytes of a call", without the update. */
const steps = (rows: readonly TrafficRow[]) => rows.filter(({ pass }) => pass !== "update").map(
  ({ purpose, group, kind, pass, calls, bytes }) => [purpose, group, kind, pass, calls, bytes / calls]);
const updates = (rows: readonly TrafficRow[]) => rows.filter(({ pass }) => pass === "update").map(
  ({ purpose, group, kind, bytes }) => [purpose, group, kind, bytes]);

describe("tensor parallel", () => {
  const loss = (tp: number) => ["all_gather", "all_reduce"].map((kind) =>
    ["cross entropy", "tp", kind, "forward", 3, (tp - 1) * T * 4]);

  test("sums after the table and the layer forward, before the layer and the head backward", () => {
    expect(steps(rowsOf("tp=4,sp=off", config("-"))[0]!)).toEqual([
      ["tensor parallel", "tp", "all_reduce", "forward", 6, 3 * T * H * 4],
      ["tensor parallel", "tp", "all_reduce", "backward", 6, 3 * T * H * 4], ...loss(4),
    ]);
  });

  test("under sp: gathered where a layer begins, scattered where it ends; backward mirrored", () => {
    const gather = (3 / 4) * T * H * 4;
    expect(steps(rowsOf("tp=4", config("-"))[0]!)).toEqual([
      ["tensor parallel", "tp", "reduce_scatter", "forward", 6, gather],
      ["tensor parallel", "tp", "all_gather", "backward", 6, gather],
      ["tensor parallel", "tp", "all_gather", "forward", 6, gather],
      ["tensor parallel", "tp", "reduce_scatter", "backward", 6, gather], ...loss(4),
    ]);
  });

  test("in a ring a sum costs two rounds whatever the number of ranks", () => {
    const [rows] = rowsOf("tp=4,sp=off,algorithm=ring", config("-"));
    expect(steps(rows!)[0]).toEqual(
      ["tensor parallel", "tp", "all_reduce", "forward", 6, 2 * (3 / 4) * T * H * 4]);
  });

  test("under sp norms are summed over tp too; keys among neighbours that share them", () => {
    const heads = { num_key_value_heads: 2 };
    // Two norms of H; a rank's key head of 8 rows, one for keys and one for values, which two ranks share.
    expect(updates(rowsOf("tp=4", config("*", heads), { zero: false })[0]!)).toEqual([
      ["gradients", "tp-dp-cp", "all_reduce", (3 * 2 + 2 * 8) * H * 4],
    ]);
    expect(updates(rowsOf("tp=4,sp=off", config("*", heads), { zero: false })[0]!)).toEqual([
      ["gradients", "tp-dp-cp", "all_reduce", 2 * 8 * H * 4],
    ]);
    const one = config("*", { num_key_value_heads: 1 });
    expect(updates(rowsOf("tp=4,sp=off", one, { zero: false })[0]!)).toEqual([
      ["gradients", "tp-dp-cp", "all_reduce", 3 * 2 * 8 * H * 4],
    ]);
    expect(updates(rowsOf("tp=4,sp=off", config("*"), { zero: false })[0]!)).toEqual([]);
  });
});

describe("context parallel", () => {
  const kv = (T / 4) * 2 * 4 * 8 * 4;
  test.each([
    ["ring", [["send", "forward", 9, kv], ["send", "backward", 9, 2 * kv]]],
    ["allgather", [
      ["all_gather", "forward", 6, (3 * kv) / 2], ["reduce_scatter", "backward", 6, (3 * kv) / 2],
    ]],
    ["alltoall", [
      ["all_to_all", "forward", 12, (3 / 4) * ((T / 4) * (12 + 8 + 12) * 8 * 4) / 4],
      ["all_to_all", "backward", 12, (3 / 4) * ((T / 4) * (12 + 8 + 12) * 8 * 4) / 4],
    ]],
  ])("attention by %s", (kind, expected) => {
    expect(steps(rowsOf(`cp=4,cp_kind=${kind}`, config("*"))[0]!)).toEqual(
      expected.map((row) => ["attention context", "cp", ...row]));
  });

  test("key heads are repeated where there are fewer than ranks", () => {
    const [few] = rowsOf("cp=4,cp_kind=alltoall", config("*", { num_key_value_heads: 2 }));
    const [many] = rowsOf("cp=4,cp_kind=alltoall", config("*"));
    expect(steps(few!)).toEqual(steps(many!));
  });

  test("Mamba-2: the columns of a head's inputs there, its outputs back, groups repeated", () => {
    const columns = 32 + 2 * 4 * 6 + 8;
    const each = ((3 / 4) * (T / 4) * (columns + 32) * 4) / 3;
    expect(steps(rowsOf("cp=4", config("M"))[0]!)).toEqual([
      ["Mamba-2 context", "cp", "all_to_all", "forward", 9, each],
      ["Mamba-2 context", "cp", "all_to_all", "backward", 9, each],
    ]);
  });
});

describe("experts", () => {
  const dispatch = (text: string, keys = {}) =>
    steps(rowsOf(text, config("E", keys))[0]!.filter(({ purpose }) => purpose === "expert dispatch"));

  test("alltoall: one row for each of a token's experts, there and back", () => {
    const rows = (T * 3 * 3) / 4;
    expect(dispatch("dp=4,ep=4")).toEqual([
      ["expert dispatch", "ep", "all_gather", "forward", 3, 3 * (8 + 1) * 4],
      ["expert dispatch", "ep", "all_to_all", "forward", 6, rows * H * 4],
      ["expert dispatch", "ep", "all_to_all", "backward", 6, rows * H * 4],
    ]);
    // Each of two ranks has half of the positions and of the experts' width.
    expect(dispatch("tp=2,dp=2,ep=2,etp=2")).toEqual([
      ["expert dispatch", "ep", "all_gather", "forward", 3, (8 + 1) * 4],
      ["expert dispatch", "ep", "all_to_all", "forward", 6, (T / 2) * 3 / 2 * H * 4],
      ["expert dispatch", "ep", "all_to_all", "backward", 6, (T / 2) * 3 / 2 * H * 4],
      ["expert dispatch", "etp", "all_gather", "forward", 6, ((T / 2) * 3 * H * 4 + (4 + 1) * 4) / 2],
      ["expert dispatch", "etp", "reduce_scatter", "forward", 3, (T / 2) * 3 * H * 4],
      ["expert dispatch", "etp", "all_gather", "backward", 3, (T / 2) * 3 * H * 4],
      ["expert dispatch", "etp", "reduce_scatter", "backward", 3, (T / 2) * 3 * H * 4],
    ]);
  });

  test("allgather: every token to every rank, with the weights and numbers of its experts", () => {
    const expected = (group: string, k: number) => [
      ["expert dispatch", group, "all_gather", "forward", 9, 3 * T * (H * 4 + 8 * k) / 3],
      ["expert dispatch", group, "reduce_scatter", "forward", 3, 3 * T * H * 4],
      ["expert dispatch", group, "all_gather", "backward", 3, 3 * T * H * 4],
      ["expert dispatch", group, "reduce_scatter", "backward", 6, 3 * T * (H * 4 + 4 * k) / 2],
    ];
    expect(dispatch("dp=4,ep=4,dispatch=allgather")).toEqual(expected("ep", 3));
    expect(dispatch("dp=4,ep=4,dispatch=allgather", { num_experts_per_tok: 1 })).toEqual(expected("ep", 1));
    expect(dispatch("tp=2,sp=off,dp=2,ep=2,etp=2,dispatch=allgather")).toEqual(expected("etp-ep", 3));
  });

  test("flex: one row for each rank with experts of the token", () => {
    expect(expectedRanks(4, 1)).toBe(1);
    expect(expectedRanks(4, 3)).toBeCloseTo(4 * (1 - (3 / 4) ** 3), 12);
    expect(expectedRanks(1, 5)).toBe(1);
    const rows = T * expectedRanks(4, 3) * (3 / 4);
    const found = dispatch("dp=4,ep=4,dispatch=flex");
    expect(found.map((row) => row.slice(0, 5))).toEqual([
      ["expert dispatch", "ep", "all_gather", "forward", 3],
      ["expert dispatch", "ep", "all_to_all", "forward", 12],
      ["expert dispatch", "ep", "all_to_all", "backward", 9],
    ]);
    expect(found[1]![5]).toBeCloseTo(rows * (2 * H * 4 + 2 * 12) / 4, 6);
    expect(found[2]![5]).toBeCloseTo(rows * (2 * H * 4 + 12) / 3, 6);
  });

  test("latent tokens are as much narrower as the latent is", () => {
    const [rows, latent] = [(T * 3 * 3) / 4, 6];
    const bytes = dispatch("dp=4,ep=4", { moe_latent_size: latent }).slice(1).map((row) => row[5]);
    expect(bytes).toEqual([rows * latent * 4, rows * latent * 4]);
  });

  test("a shared expert is a tensor-parallel layer of its own, routed ones are none", () => {
    const calls = (keys: Readonly<Record<string, unknown>>) => rowsOf("tp=2", config("E", keys))[0]!
      .find(({ purpose, kind, pass }) =>
        purpose === "tensor parallel" && kind === "all_gather" && pass === "forward")?.calls;
    expect(calls({})).toBe(3);
    expect(calls({ moe_shared_expert_intermediate_size: 16 })).toBe(6);
  });
});

describe("pipeline", () => {
  const messages = (text: string, model = config("----"), options: TrafficOptions = {}) =>
    rowsOf(text, model, options).map((rows) => rows
      .filter(({ purpose }) => purpose === "pipeline").map(({ pass, calls, bytes }) => [pass, calls, bytes]));
  const message = T * H * 4;

  test("hidden states go on, gradients come back; with chunks once for each", () => {
    expect(messages("pp=2")).toEqual([
      [["forward", 3, 3 * message]], [["backward", 3, 3 * message]],
    ]);
    expect(messages("pp=2,vpp=2")).toEqual([
      [["forward", 6, 6 * message], ["backward", 3, 3 * message]],
      [["forward", 3, 3 * message], ["backward", 6, 6 * message]],
    ]);
    expect(messages("pp=2,tp=2,cp=2")[0]).toEqual([["forward", 3, (3 * message) / 4]]);
    expect(messages("dp=2")).toEqual([[]]);
  });

  test("behind the prediction block the states of all depths travel", () => {
    const model = config("--", { mtp_hybrid_override_pattern: "-", num_nextn_predict_layers: 1 });
    expect(messages("pp=3,stages=Ett|m|L", model, { mtp_depths: 2 })).toEqual([
      [["forward", 3, 3 * message]],
      [["forward", 3, 9 * message], ["backward", 3, 3 * message]],
      [["backward", 3, 9 * message]],
    ]);
  });

  test("a copy of the embedding table is summed with the first stage's", () => {
    const model = config("--", { mtp_hybrid_override_pattern: "-", num_nextn_predict_layers: 1 });
    const found = rowsOf("pp=3,tp=2,sp=off,stages=Et|t|mL", model).map(updates);
    const copy = ["embedding copy", "embedding", "send", 24 * H * 4];
    expect(found).toEqual([[copy], [], [copy]]);
    const shared = rowsOf("pp=3,dp=2,stages=Et|t|mL", model).map(updates);
    expect(shared[2]!.at(-1)).toEqual(["embedding copy", "embedding", "send", 24 * H * 4]);
  });
});

describe("the update", () => {
  test("dense gradients are summed over dp-cp, those of experts over edp", () => {
    const model = config("E");
    const [holds] = holdingsOf(parseLayout("dp=4,cp=2,ep=4"), model);
    expect(updates(rowsOf("dp=4,cp=2,ep=4", model, { zero: false })[0]!)).toEqual([
      ["gradients", "dp-cp", "all_reduce", 7 * holds!.dense * 4],
      ["expert gradients", "edp", "all_reduce", holds!.experts * 4],
    ]);
    const options = { widths: { activation: 2, gradient: 4, parameter: 2 } };
    expect(updates(rowsOf("dp=4,cp=2,ep=4", model, options)[0]!)).toEqual([
      ["gradients", "dp-cp", "reduce_scatter", (7 / 8) * holds!.dense * 4],
      ["parameters", "dp-cp", "all_gather", (7 / 8) * holds!.dense * 2],
      ["expert gradients", "edp", "reduce_scatter", (1 / 2) * holds!.experts * 4],
      ["expert parameters", "edp", "all_gather", (1 / 2) * holds!.experts * 2],
    ]);
  });

  test("one rank sends nothing", () => {
    expect(rowsOf("", preset("unit"))).toEqual([[]]);
    expect(totalBytes([])).toBe(0);
    expect(totalBytes(rowsOf("dp=2", config("-"), { zero: false })[0]!)).toBe(
      4 * countParameters(config("-")).total);
  });
});

describe("holdings", () => {
  test.each(["", "tp=2,pp=2", "tp=2,cp=2,pp=2,ep=4,vpp=2", "tp=2,etp=2,pp=3", "tp=2,ep=8,dp=4"])(
    "%s: the ranks together hold every parameter as often as there are copies", (text) => {
      const model = preset("unit");
      const layout = parseLayout(text);
      const holds = holdingsOf(layout, model);
      const sum = (count: (parameter: ReturnType<typeof listParameters>[number]) => number) =>
        listParameters(model).reduce((total, parameter) => total + count(parameter), 0);
      const experts = sum(({ kind, shape }) => (kind === "expert" ? sizeOf(shape) : 0));
      const dense = sum(({ kind, shape, trainable }) =>
        (kind === "expert" || !trainable ? 0 : sizeOf(shape)));
      const all = (key: keyof (typeof holds)[number]) => holds.reduce((total, each) => total + each[key], 0);
      expect(all("experts") * layout.ep * layout.etp).toBe(experts);
      // Each rank of tp has its own part, and a copy of what is whole.
      expect((all("dense") - all("whole") - all("copied")) * layout.tp + all("whole")).toBe(dense);
      expect(all("untrained")).toBe(sum(({ shape, trainable }) => (trainable ? 0 : sizeOf(shape))));
      const last = placeOfStage(layout, stagesOf(layout, model).length - 1).rank;
      expect(holds.map(({ copied }) => copied > 0)).toEqual(
        holds.map((_, rank) => layout.pp > 1 && rank === last));
    });
});
