import { readdirSync } from "node:fs";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { afterAll, describe, expect, test } from "vitest";
import { openFolder } from "../../src/io/files.node.ts";
import { openDevice } from "../../src/tensor/device.ts";
import { testAdapters } from "../support/adapters.ts";
import { checkGoldenCase } from "./golden.ts";

const root = fileURLToPath(new URL("../fixtures/golden", import.meta.url));
const cases = readdirSync(root);

for (const handle of await testAdapters()) {
  describe(handle.info.id, async () => {
    const device = await openDevice({ adapter: handle });
    afterAll(() => device.destroy());
    for (const name of cases) {
      test(name, async () => {
        const { compared, worst, failures } = await checkGoldenCase(device, openFolder(join(root, name)));
        expect(failures, `worst: ${worst.name} ${worst.error}`).toEqual([]);
        expect(compared).toBeGreaterThan(5);
      });
    }
  });
}
