import fc from "fast-check";
import { describe, expect, test } from "vitest";
import { Progress, type ProgressOptions } from "../../src/cli/progress.ts";
import {
  colours, formatBytes, formatCount, formatDuration, table, truncate, visibleWidth, wantsColour, wrap,
} from "../../src/cli/terminal.ts";

const HIDE = "\x1b[?25l";
const SHOW = "\x1b[?25h";

function setup(options: ProgressOptions & { tty?: boolean; columns?: number } = {}) {
  const { tty = true, columns = 100, ...rest } = options;
  const screen = { text: "", time: 0 };
  const stream = { isTTY: tty, columns, write: (text: string) => (screen.text += text) };
  const progress = new Progress({ env: { NO_COLOR: "1" }, ...rest, stream, now: () => screen.time });
  return { screen, progress };
}

/** The lines that a terminal would show. */
function shown(text: string): string[] {
  const lines = text.replaceAll(HIDE, "").replaceAll(SHOW, "").split("\n");
  return lines.map((line) => line.split("\r\x1b[2K").at(-1)!);
}

describe("Progress on a terminal", () => {
  test("draws one line over and over and leaves the last state", () => {
    const { screen, progress } = setup({ total: 200 });
    progress.update({ step: 0 });
    for (let step = 1; step <= 200; step++) {
      screen.time += 1000;
      progress.update({ step, loss: 5 - step / 100, tokensPerSecond: 20480 });
      if (step === 100) {
        expect(shown(screen.text)).toEqual([
          `step 100/200  ${"━".repeat(12)}${"─".repeat(12)}  loss 4.0000  20.5k tok/s  1 min 40 s left`,
        ]);
      }
    }
    progress.done();
    expect(shown(screen.text))
      .toEqual([`step 200/200  ${"━".repeat(24)}  loss 3.0000  20.5k tok/s  took 3 min 20 s`, ""]);
  });

  test("hides the cursor once, and gives it back", () => {
    const before = process.listenerCount("exit");
    const { screen, progress } = setup({ total: 10 });
    for (let step = 0; step < 10; step++) {
      screen.time += 100;
      progress.update({ step });
    }
    expect(screen.text.split(HIDE)).toHaveLength(2);
    expect(process.listenerCount("exit")).toBe(before + 1); // gives it back should the command end early
    progress.done();
    progress.done();
    expect(screen.text.endsWith(SHOW)).toBe(true);
    expect(screen.text.split(SHOW)).toHaveLength(2);
    expect(process.listenerCount("exit")).toBe(before);
  });

  test("draws at most every 80 ms", () => {
    const { screen, progress } = setup({ total: 1000 });
    for (let step = 1; step <= 1000; step++) {
      screen.time += 1;
      progress.update({ step });
    }
    expect(screen.text.split("\x1b[2K").length - 1).toBe(13);
    progress.done("finished");
    expect(shown(screen.text)).toEqual(["finished", ""]);
  });

  test("writes lines above itself", () => {
    const { screen, progress } = setup({ total: 4 });
    progress.log("before");
    expect(screen.text).toBe("\r\x1b[2Kbefore\n"); // nothing to draw yet
    progress.update({ step: 1 });
    progress.log("a sample");
    expect(shown(screen.text).slice(0, 2)).toEqual(["before", "a sample"]);
    expect(shown(screen.text)[2]).toMatch(/^step 1\/4 /);
    progress.done("end");
    progress.log("after");
    expect(shown(screen.text)).toEqual(["before", "a sample", "end", "after", ""]);
  });

  test("never fills the line, or it could not be drawn over", () => {
    fc.assert(fc.property(fc.integer({ min: 2, max: 140 }), fc.string({ maxLength: 60 }), (columns, note) => {
      const { screen, progress } = setup({ total: 1000, columns, env: {} });
      progress.update({ step: 500, loss: 1.5, tokensPerSecond: 1e5, note: note.replace(/\p{C}/gu, "") });
      expect(visibleWidth(shown(screen.text)[0]!)).toBeLessThan(columns);
      progress.done("");
    }));
    const { screen, progress } = setup({ total: 1000, columns: 40 });
    progress.update({ step: 500, loss: 1.5 });
    expect(shown(screen.text)).toEqual(["step  500/1000  loss 1.5000  0 s left"]);
    progress.done("");
  });

  test("reckons the time left from the first update of this run", () => {
    const { screen, progress } = setup({ total: 110, start: 10 });
    screen.time = 60_000; // compiling
    progress.update({ step: 11 });
    screen.time = 62_000;
    progress.update({ step: 12 });
    expect(shown(screen.text)[0]).toMatch(/ {2}3 min 16 s left$/);
    progress.done("");
  });

  test("shows a loss that is not finite, and no bar without a total", () => {
    const { screen, progress } = setup({ label: "tokens" });
    progress.update({ step: 7, loss: NaN, note: "careful" });
    expect(shown(screen.text)).toEqual(["tokens 7  loss NaN  careful"]);
    progress.done("");
  });
});

describe("Progress elsewhere", () => {
  test("writes a plain line every few seconds, and the last state", () => {
    const { screen, progress } = setup({ tty: false, total: 100, env: { FORCE_COLOR: "1" } });
    for (let step = 1; step <= 100; step++) {
      screen.time += 120;
      progress.update({ step, loss: 2, note: step === 100 ? "validation 1.90" : undefined });
    }
    progress.done();
    expect(screen.text.split("\n")).toEqual([
      "step  42/100  loss 2.0000  7 s left",
      "step  84/100  loss 2.0000  2 s left",
      "step 100/100  loss 2.0000  took 12 s  validation 1.90",
      "",
    ]);
  });

  test("takes a dumb terminal for no terminal", () => {
    const { screen, progress } = setup({ env: { TERM: "dumb" }, plainInterval: 0, total: 2 });
    progress.update({ step: 1 });
    progress.done("end");
    expect(screen.text).toBe("step 1/2  0 s left\nend\n");
  });

  test("is silent when told so", () => {
    const { screen, progress } = setup({ silent: true, total: 2 });
    progress.update({ step: 1 });
    progress.log("line");
    progress.done("end");
    expect(screen.text).toBe("");
  });
});

describe("terminal texts", () => {
  test.each([
    [0, "0 B"], [1023, "1023 B"], [1024, "1.0 KiB"], [1024 * 1023.96, "1.0 MiB"], [3.25 * 2 ** 30, "3.3 GiB"],
  ])("formatBytes(%d) is %s", (bytes, text) => expect(formatBytes(bytes)).toBe(text));

  test.each([
    [0, "0"], [999, "999"], [0.12345, "0.123"], [1234, "1.23k"], [34_567, "34.6k"], [999_600, "1.00M"],
    [1_250_000, "1.25M"], [3e10, "30.0B"], [-4500, "-4.50k"],
  ])("formatCount(%d) is %s", (count, text) => expect(formatCount(count)).toBe(text));

  test.each([
    [0.25, "0.25 s"], [8, "8 s"], [9.996, "10.0 s"],
    [59.96, "1 min 00 s"], [245, "4 min 05 s"], [3599.7, "1 h 00 min"],
    [7620, "2 h 07 min"], [273_600, "3 d 4 h"], [Infinity, "?"], [NaN, "?"], [-1, "?"],
  ])("formatDuration(%d) is %s", (seconds, text) => expect(formatDuration(seconds)).toBe(text));

  test("tables line up, colours or not", () => {
    const paint = colours(true);
    const text = table([["name", "size"], [paint.red("é"), "5"], ["longer", paint.bold("1234")]], {
      align: ["left", "right"], indent: "  ",
    });
    const lines = text.split("\n");
    expect(lines.map(visibleWidth)).toEqual([14, 14, 14]);
    expect(lines[0]).toBe("  name    size");
    expect(lines[1]).toBe("  \x1b[31mé\x1b[39m          5");
    expect(table([["a", "b"], ["ccc"]])).toBe("a    b\nccc");
  });

  test("colours give texts back as they are when off", () => {
    expect(colours(false).green("x")).toBe("x");
    expect(colours(true).green("")).toBe("");
  });

  test("wantsColour follows the terminal, NO_COLOR and FORCE_COLOR", () => {
    const [terminal, pipe] = [{ isTTY: true, write: () => {} }, { write: () => {} }];
    expect(wantsColour(terminal, {})).toBe(true);
    expect(wantsColour(pipe, {})).toBe(false);
    expect(wantsColour(terminal, { NO_COLOR: "1" })).toBe(false);
    expect(wantsColour(terminal, { NO_COLOR: "" })).toBe(true);
    expect(wantsColour(pipe, { FORCE_COLOR: "1" })).toBe(true);
    expect(wantsColour(pipe, { FORCE_COLOR: "1", NO_COLOR: "1" })).toBe(false);
    expect(wantsColour(terminal, { TERM: "dumb" })).toBe(false);
  });

  test("wrap and truncate keep to the width", () => {
    expect(wrap("the quick brown fox", 9)).toEqual(["the quick", "brown fox"]);
    expect(wrap("unbreakable word", 4)).toEqual(["unbreakable", "word"]);
    expect(wrap("", 4)).toEqual([]);
    expect(truncate("abcdef", 4)).toBe("abc…");
    expect(truncate("abcd", 4)).toBe("abcd");
    expect(truncate("abcd", 0)).toBe("");
  });
});
