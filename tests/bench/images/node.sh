#!/bin/sh
# A Node application with the dependencies of an ordinary front-end project: more than 30,000 small files.
#
#   node.sh OUT
. "$(dirname -- "$0")/../../demo/stages.sh"

base
install 2-node "nodejs"
# With the npm of this machine, which knows the way to its registry; scripts of packages do not run.
say "packages of npm"
mkdir -p "$out/3-modules/app"
cat > "$out/3-modules/app/package.json" <<'END'
{ "name": "bench", "version": "1.0.0", "private": true, "dependencies": {
    "@babel/core": "7.26.0", "@babel/preset-env": "7.26.0", "@emotion/react": "11.13.5", "@emotion/styled": "11.13.5", "@mui/icons-material": "5.16.7", "@mui/material": "5.16.7",
    "core-js": "3.39.0", "date-fns": "4.1.0", "eslint": "8.57.1", "express": "4.21.1", "lodash": "4.17.21",
    "react": "18.3.1", "react-dom": "18.3.1", "rxjs": "7.8.1", "typescript": "5.6.3", "webpack": "5.96.1" } }
END
npm install --prefix "$out/3-modules/app" --ignore-scripts --no-audit --no-fund --cache "$work/npm" > "$work/npm.log" 2>&1 \
    || { tail -n 30 "$work/npm.log" >&2; exit 1; }
lower=3-modules:$lower
stage 4-app sh -ec '
    cat > /app/server.js <<END
const express = require("express"), lodash = require("lodash"), dates = require("date-fns");
const react = require("react"), dom = require("react-dom/server");
require("rxjs"); require("core-js/stable"); require("@babel/core"); require("webpack"); require("eslint");
const { Button } = require("@mui/material");
const app = express();
app.get("/", (request, response) => response.send(dom.renderToString(
  react.createElement(Button, null, lodash.upperCase("it works") + dates.format(new Date(2026, 0, 1), " yyyy")))));
app.listen(process.env.PORT, "127.0.0.1");
END
    printf "#!/bin/sh\nexec node /app/server.js\n" > /usr/local/bin/start
    chmod 755 /usr/local/bin/start
'
finish
