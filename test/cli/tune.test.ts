import { existsSync, readdirSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { describe, expect, test } from "vitest";
import type { Decision } from "../../src/kernel/tune.ts";
import { fixture, here, krait, withFolder } from "./krait.ts";

interface Report {
  readonly adapter: string;
  readonly classes: number;
  readonly undecided: number;
  readonly spent_ms: number;
  readonly decisions: readonly Decision[];
}

const small = ["--config", fixture("micro.json"), "--batch", "1", "--seqlen", "16", "--prompt", "8"];

describe("tune", () => {
  test("measures, keeps, shows a table, goes on and starts over", () => withFolder(async (folder) => {
    const env = { KRAIT_TUNER: "", KRAIT_CACHE: folder };
    const tune = (...args: string[]) => krait(["tune", ...small, ...args], undefined, env);
    const report = async (...args: string[]) => {
      const { code, stdout, stderr } = await tune("--json", ...args);
      expect(code, stderr).toBe(0);
      return JSON.parse(stdout) as Report;
    };
    const none = await report("--budget", "0s");
    expect(none.classes).toBeGreaterThan(3);
    expect(none).toMatchObject({ undecided: none.classes, decisions: [] });
    // Interrupted as soon as something is decided: it says what it has, and the next run goes on from there.
    const cut = await krait(["tune", ...small, "--budget", "60s"], undefined, env, (child) => {
      const timer = setInterval(() => {
        if (existsSync(join(folder, "tuning")) && readdirSync(join(folder, "tuning")).length > 0) {
          clearInterval(timer);
          child.kill("SIGINT");
        }
      }, 20);
      child.on("exit", () => clearInterval(timer));
    });
    expect(cut.code).toBe(130);
    expect(cut.stdout).toMatch(/shape classes of .* are decided/);
    expect(cut.stdout).toContain("Run the command again to go on");
    const some = await report("--budget", "0s");
    expect(some.undecided).toBeLessThan(none.classes);
    expect(some.undecided).toBeGreaterThan(0);
    const more = await report("--budget", "3s");
    expect(more.undecided).toBeLessThan(some.undecided);
    expect(more.decisions).toEqual(expect.arrayContaining(some.decisions.filter((d) => d.choice !== null)));
    for (const { choice, default: fallback, ms, rejected } of more.decisions) {
      if (choice !== null) expect([fallback, ...Object.keys({ ...ms, ...rejected })]).toContain(choice);
    }
    const [file] = readdirSync(join(folder, "tuning"));
    expect(file).toContain(some.adapter);
    const shown = await tune("--budget", "0s");
    expect(shown.stdout).toMatch(/^\w+\/\w+.*\n class +choice +time.*\n(?: +others\n)? .* ms /m);
    expect(shown.stdout).toContain(`Kept in ${join(folder, "tuning", file!)}`);
    const wide = shown.stdout.split("\n").filter((line) => line.startsWith(" ") && line.length > 80);
    expect(wide).toEqual([]);
    // A damaged file is as good as none, for every command.
    writeFileSync(join(folder, "tuning", file!), '{"format": "krait-tun');
    expect((await report("--budget", "0s")).undecided).toBe(none.classes);
    await report("--budget", "0s", "--reset");
    expect(readdirSync(join(folder, "tuning"))).toEqual([]);
  }), 120_000);

  test("refuses what it cannot do, in a sentence", async () => {
    const off = await krait(["tune", ...small], undefined, { KRAIT_TUNER: "off" });
    expect(off).toMatchObject({ code: 2 });
    expect(off.stderr).toContain("switched off by KRAIT_TUNER=off");
    const odd = await here(["tune", "--budget", "soon"]);
    expect(odd).toMatchObject({ code: 2 });
    expect(odd.stderr).toContain('--budget must be a time such as 10s or 2min, found "soon"');
  });
});
