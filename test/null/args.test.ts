import { describe, expect, test } from "vitest";
import { type CliIo, closest, defineCommand, parseCommand, runCli } from "../../src/cli/args.ts";
import { FormatError, UsageError } from "../../src/tensor/errors.ts";

const spec = {
  options: {
    steps: { type: "integer", short: "n", default: 100, min: 1, help: "Optimiser steps." },
    learningRate: { type: "number", value: "RATE", min: 0, max: 1, help: "Peak learning rate." },
    preset: { type: "string", choices: ["tiny", "small"], default: "tiny", help: "Model size." },
    out: { type: "string", value: "FOLDER", help: "Where checkpoints go." },
    set: { type: "string", multiple: true, value: "KEY=VALUE", help: "Overrides a setting." },
    json: { type: "boolean", short: "j", help: "Machine output." },
    sample: { type: "boolean", default: true, help: "Print samples." },
  },
  positionals: [{ name: "PATH", many: true, help: "name at least one file or folder." }],
} as const;
const parse = (...argv: string[]) => parseCommand(spec, argv);

describe("parseCommand", () => {
  test("fills in defaults", () => {
    expect(parse("a")).toEqual({
      args: ["a"],
      options: {
        steps: 100, learningRate: undefined, preset: "tiny", out: undefined, set: [],
        json: false, sample: true,
      },
    });
  });

  test("reads every spelling", () => {
    const { args, options } = parse(
      "a", "--steps=5", "--learning-rate", "2.5e-3", "--preset", "small", "--set", "x=1", "b",
      "--set=y=2", "-j", "--no-sample", "--out=-odd", "--", "--c",
    );
    expect(args).toEqual(["a", "b", "--c"]);
    expect(options).toEqual({
      steps: 5, learningRate: 0.0025, preset: "small", out: "-odd", set: ["x=1", "y=2"],
      json: true, sample: false,
    });
    expect(parse("a", "-jn7").options).toMatchObject({ json: true, steps: 7 });
    expect(parse("a", "-n", "8", "-n", "9").options.steps).toBe(9);
  });

  test("has typed values", () => {
    const { options } = parse("a");
    const steps: number = options.steps;
    const rate: number | undefined = options.learningRate;
    const preset: "tiny" | "small" = options.preset;
    const set: readonly string[] = options.set;
    const json: boolean = options.json;
    // @ts-expect-error -- without a default there may be no value
    const out: string = options.out;
    expect([steps, rate, preset, set, json, out]).toEqual([100, undefined, "tiny", [], false, undefined]);
  });

  test.each<[string[], RegExp]>([
    [["a", "--stpes", "5"], /^Unknown option --stpes; did you mean --steps\?$/],
    [["a", "--learningrate=1"], /^Unknown option --learningrate; did you mean --learning-rate\?$/],
    [["a", "--zzz"], /^Unknown option --zzz\.$/],
    [["a", "-x"], /^Unknown option -x\.$/],
    [["a", "--no-steps"], /^Unknown option --no-steps\.$/],
    [["a", "--steps", "five"], /^--steps needs a whole number, found "five"\.$/],
    [["a", "--steps", "1.5"], /whole number, found "1\.5"/],
    [["a", "--steps", "99999999999999999999"], /whole number, found/],
    [["a", "-n", "0x10"], /^-n needs a whole number, found "0x10"\.$/],
    [["a", "--steps", "0"], /^--steps must be at least 1, found 0\.$/],
    [["a", "--steps", "-4"], /^--steps must be at least 1, found -4\.$/],
    [["a", "--learning-rate", "2"], /^--learning-rate must be from 0 to 1, found 2\.$/],
    [["a", "--learning-rate", "1e999"], /needs a number, found "1e999"/],
    [["a", "--learning-rate="], /^--learning-rate needs a value\.$/],
    [["a", "--steps"], /^--steps needs a value\.$/],
    [["a", "--out", "--json"], /^--out needs a value; if that is "--json", write --out=--json\.$/],
    [["a", "--preset", "tinny"], /^--preset must be one of tiny, small, found "tinny"; .* "tiny"\?$/],
    [["a", "--json=yes"], /^--json takes no value, found "yes"\.$/],
    [[], /^The argument PATH is missing: name at least one file or folder\.$/],
  ])("refuses %j in one sentence", (argv, message) => {
    expect(() => parse(...argv)).toThrow(UsageError);
    expect(() => parse(...argv)).toThrow(message);
  });

  test("checks required options and the number of positionals", () => {
    const strict = {
      options: { model: { type: "string", required: true, help: "" } },
      positionals: [{ name: "A", help: "first." }, { name: "B", optional: true, help: "second." }],
    } as const;
    expect(parseCommand(strict, ["--model", "m", "1"])).toEqual({ options: { model: "m" }, args: ["1"] });
    expect(() => parseCommand(strict, ["1"])).toThrow(/^The option --model is required\.$/);
    const three = ["1", "2", "3", "--model", "m"];
    expect(() => parseCommand(strict, three)).toThrow(/^Unexpected argument "3"\.$/);
    expect(() => parseCommand({ options: {} }, ["extra"])).toThrow(/Unexpected argument "extra"/);
  });
});

test("closest finds misspellings, exchanges and beginnings, and leaves strangers alone", () => {
  const words = ["train", "generate", "doctor", "bench"];
  expect(closest("trian", words)).toBe("train");
  expect(closest("generat", words)).toBe("generate");
  expect(closest("gen", words)).toBe("generate");
  expect(closest("docktor", words)).toBe("doctor");
  expect(closest("serve", words)).toBeUndefined();
  expect(closest("x", words)).toBeUndefined();
});

describe("runCli", () => {
  const train = defineCommand({
    name: "train",
    summary: "Train a model on text.",
    description: "First paragraph.\n\nSecond paragraph.",
    ...spec,
    examples: ["krait train corpus/ --steps 200"],
    run({ options, args, stdout, signal }) {
      if (args[0] === "damaged") throw new FormatError("damaged is damaged.");
      if (args[0] === "defect") throw new TypeError("a defect");
      if (args[0] === "seven") return 7;
      if (args[0] === "stop") signal.throwIfAborted();
      stdout.write(`${options.steps} ${options.preset}\n`);
      return undefined;
    },
  });
  const slow = defineCommand({
    name: "slow", summary: "Waits.", options: {},
    run: ({ signal }) => new Promise<void>((resolve) => signal.addEventListener("abort", () => resolve())),
  });

  async function cli(argv: string[], more: { env?: CliIo["env"]; signal?: AbortSignal } = {}) {
    let out = "";
    let err = "";
    const io = {
      stdout: { write: (text: string) => (out += text) },
      stderr: { write: (text: string) => (err += text) },
      env: more.env ?? {},
    };
    const signal = more.signal ?? new AbortController().signal;
    const code = await runCli([train, slow], argv, { version: "1.2.3", summary: "Models.", io, signal });
    return { code, out, err };
  }

  test("runs a command", async () => {
    expect(await cli(["train", "x", "--steps", "3"])).toEqual({ code: 0, out: "3 tiny\n", err: "" });
    expect((await cli(["train", "seven"])).code).toBe(7);
  });

  test.each([[["--version"]], [["-v"]]])("prints its version for %j", async (argv) => {
    expect(await cli(argv)).toEqual({ code: 0, out: "1.2.3\n", err: "" });
  });

  test.each([[[]], [["help"]], [["--help"]], [["-h"]]])("lists the commands for %j", async (argv) => {
    const { code, out, err } = await cli(argv);
    expect([code, err]).toEqual([0, ""]);
    expect(out).toContain("Usage: krait COMMAND [options]");
    expect(out).toMatch(/^ {2}train +Train a model on text\.$/m);
  });

  test.each([[["train", "--help"]], [["train", "x", "--stepz", "-h"]], [["help", "train"]]])(
    "explains a command for %j", async (argv) => {
      const { code, out, err } = await cli(argv);
      expect([code, err]).toEqual([0, ""]);
      expect(out).toContain("Usage: krait train [options] PATH...\n\nFirst paragraph.\n\nSecond paragraph.");
      expect(out).toMatch(/^ {2}-n, --steps N +Optimiser steps\. \(default 100\)$/m);
      expect(out).toMatch(/^ {6}--learning-rate RATE +Peak learning rate\.$/m);
      expect(out).toMatch(/^ {6}--preset TEXT +Model size\. \(one of tiny, small; default tiny\)$/m);
      expect(out).toMatch(/^ {6}--set KEY=VALUE +Overrides a setting\. \(may be repeated\)$/m);
      expect(out).toMatch(/^ {2}-j, --json +Machine output\.$/m);
      expect(out).toMatch(/^ {6}--\[no-\]sample +Print samples\. \(on by default\)$/m);
      expect(out).toMatch(/^ {2}-h, --help +Show this help\.$/m);
      expect(out).toMatch(/Examples:\n {2}krait train corpus\/ --steps 200\n$/);
    });

  test("takes --help after -- as an argument", async () => {
    expect((await cli(["train", "--", "--help"])).out).toBe("100 tiny\n");
  });

  test("answers wrong usage with 2, on standard error", async () => {
    expect(await cli(["trian", "x"])).toEqual({
      code: 2, out: "",
      err: 'krait: Unknown command "trian"; did you mean "train"?\n'
        + 'Run "krait --help" for the list of commands.\n',
    });
    expect(await cli(["train", "x", "--steps", "x"])).toEqual({
      code: 2, out: "",
      err: 'krait train: --steps needs a whole number, found "x".\n'
        + 'Run "krait train --help" for its options.\n',
    });
  });

  test("answers failures with 1, with the stack of defects alone", async () => {
    const damaged = { code: 1, out: "", err: "krait train: damaged is damaged.\n" };
    expect(await cli(["train", "damaged"])).toEqual(damaged);
    expect((await cli(["train", "damaged"], { env: { KRAIT_DEBUG: "1" } })).err).toMatch(/damaged\.\n\s+at /);
    const defect = await cli(["train", "defect"]);
    expect(defect.code).toBe(1);
    expect(defect.err).toMatch(/^krait train: TypeError: a defect\n\s+at /);
  });

  test("answers interruption with 130, however the command ends", async () => {
    const controller = new AbortController();
    const waiting = cli(["slow"], { signal: controller.signal });
    controller.abort();
    expect(await waiting).toEqual({ code: 130, out: "", err: "" });
    expect(await cli(["train", "stop"], { signal: AbortSignal.abort() }))
      .toEqual({ code: 130, out: "", err: "krait train: Interrupted.\n" });
  });

  test("turns SIGINT into an abort and lets go of it afterwards", async () => {
    const before = process.listenerCount("SIGINT");
    const io = { stdout: { write: () => {} }, stderr: { write: () => {} }, env: {} };
    const running = runCli([slow], ["slow"], { version: "1", summary: "", io });
    expect(process.listenerCount("SIGINT")).toBe(before + 1);
    process.emit("SIGINT");
    expect(await running).toBe(130);
    expect(process.listenerCount("SIGINT")).toBe(before);
  });
});
