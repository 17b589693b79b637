import { expect, test } from "vitest";
import { fixture, here, krait } from "./krait.ts";

test("krait plan prints the best layouts, where a step goes and why the others lose", async () => {
  const { code, stdout, stderr } = await krait(
    ["plan", "--model", "nemotron-3-nano", "--gpus", "16", "--gpu", "h100", "--top", "3"]);
  expect(code, stderr).toBe(0);
  expect(stdout).toContain("nemotron-3-nano-30b-a3b, 31.6B parameters, on 16 x h100 in bf16");
  expect(stdout.match(/^ \d {2}tp=/gm)).toHaveLength(3);
  for (const part of ["expert exchange", "optimiser", "activations, mamba", "Why the others", "Searched"]) {
    expect(stdout).toContain(part);
  }
});

test("--json has the same as numbers, for a configuration of one's own and one layout", async () => {
  const layout = "tp=1,cp=1,pp=1,dp=8,ep=4,etp=1";
  const { code, stdout, stderr } = await here([
    "plan", "--model", fixture("micro.json"), "--gpus", "8", "--gpu", "gb200", "--precision", "mxfp8",
    "--seqlen", "1024", "--global-batch", "64", "--layout", layout, "--json",
  ]);
  expect(code, stderr).toBe(0);
  const facts = JSON.parse(stdout) as {
    gpus: number; searched: number; plans: { layout: string; mfu: number; memory: { total: number } }[];
  };
  expect(facts.gpus).toBe(8);
  expect(facts.plans[0]!.layout).toContain(layout);
  expect(facts.plans[0]!.mfu).toBeGreaterThan(0);
  expect(facts.plans[0]!.memory.total).toBeLessThan(186e9);
});

test("--validate prints the predictions beside published rates, the errors and the orders", async () => {
  const { code, stdout, stderr } = await here(["plan", "--validate"]);
  expect(code, stderr).toBe(0);
  expect(stdout.match(/^ F[123]( scaling| context)? .* x (h100|gb200|gb300) /gm)).toHaveLength(72);
  expect(stdout).toMatch(/^ F3 +20 +\d\.\d % /m);
  expect(stdout).toMatch(/^ all +70 /m);
  expect(stdout).toContain(" same  methods, mixtral-8x22b: fsdp < fsdp+ep < tp+ep+dp < five-way < folded");
  for (const part of ["Operations per token", "Efficiencies, the same for all rows", "Left out"]) {
    expect(stdout).toContain(part);
  }
}, 120_000);

test.each<[string, string[], string]>([
  ["an unknown model", ["--model", "nope", "--gpus", "8"], "\"nope\" is neither a known model (mixtral"],
  ["an unknown GPU", ["--model", "tiny", "--gpus", "8", "--gpu", "v100"], "must be one of a100, h100"],
  ["a model that is too large", ["--model", "nemotron-3-ultra", "--gpus", "8"], "the smallest needs at"],
  ["GPUs that no layout fills", ["--model", "tiny", "--gpus", "7", "--global-batch", "4"],
    "fills 7 x h100 with 4 sequences a step"],
  ["no GPUs", ["--model", "tiny"], "The option --gpus is required."],
])("%s is refused with one sentence", async (_what, args, message) => {
  const { code, stdout, stderr } = await here(["plan", ...args]);
  expect(code).toBe(2);
  expect(stdout).toBe("");
  expect(stderr.split("\n")[0]).toContain(message);
});
