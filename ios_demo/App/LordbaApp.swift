import SwiftUI

@main
struct LordbaApp: App {
  @State private var app = AppModel()

  var body: some Scene {
    WindowGroup {
      TabView {
        ModelsScreen().tabItem { Label("Models", systemImage: "shippingbox") }
        ChatScreen().tabItem { Label("Chat", systemImage: "bubble.left.and.bubble.right") }
        LatencyScreen().tabItem { Label("Latency", systemImage: "stopwatch") }
      }
      .environment(app)
      .task { await app.library.refresh() }
    }
  }
}
