// Says what this browser lacks. A plain script of old JavaScript, so that old browsers run it.
(function () {
  // An empty WebAssembly module with one SIMD instruction.
  var simd = [0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 10, 1, 8, 0, 65, 0,
    253, 15, 253, 98, 11];

  function has(test) {
    try { return Boolean(test()); } catch (error) { return false; }
  }

  var needs = [
    ["JavaScript modules", function () { return "noModule" in document.createElement("script"); }],
    ["workers", function () { return window.Worker; }],
    ["WebAssembly", function () { return window.WebAssembly; }],
    ["WebAssembly with SIMD", function () { return WebAssembly.validate(new Uint8Array(simd)); }],
    ["hashes (crypto.subtle)", function () { return window.crypto.subtle; }]
  ];
  var missing = [];
  for (var i = 0; i < needs.length; i++) if (!has(needs[i][1])) missing.push(needs[i][0]);

  function say(text) {
    var show = function () {
      var notice = document.getElementById("notice");
      document.getElementById("notice-title").textContent = "This browser cannot show the world";
      document.getElementById("notice-text").textContent = text;
      document.getElementById("notice-button").hidden = true;
      notice.hidden = false;
    };
    if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", show);
    else show();
  }

  if (missing.length) {
    window.scdMissing = "It lacks " + missing.join(", ") + (window.isSecureContext === false
      ? ". Browsers offer that at secure addresses only: open the page by https, or at localhost."
      : ". A newer browser will do.");
    say(window.scdMissing); // the page's modules do not begin then
  }
  window.addEventListener("error", function (event) {
    if (/SyntaxError/.test(String(event.error || event.message))) {
      say("It is too old for the page's JavaScript. A newer browser will do.");
    }
  });
})();
