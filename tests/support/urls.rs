//! Web servers that foreign layers are available from.

use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::sync::{Arc, Mutex};

/// A server of one file, which notes what it is asked for. It ends with the process.
///
/// # Panics
/// When there is no port to listen on.
#[must_use]
pub fn serve(content: Vec<u8>) -> (String, Arc<Mutex<Vec<String>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let (address, asked) = (listener.local_addr().unwrap(), Arc::new(Mutex::new(Vec::new())));
    let heads = Arc::clone(&asked);
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let (mut stream, mut head) = (stream.unwrap(), Vec::new());
            while !head.ends_with(b"\r\n\r\n") {
                let mut byte = [0];
                stream.read_exact(&mut byte).unwrap();
                head.push(byte[0]);
            }
            let head = String::from_utf8(head).unwrap().to_ascii_lowercase();
            let answer = if head.starts_with("get /moved") {
                "HTTP/1.1 302 Found\r\nLocation: /layer\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".to_owned()
            } else {
                format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", content.len())
            };
            stream.write_all(answer.as_bytes()).unwrap();
            if answer.contains("200") {
                let _ = stream.write_all(&content);
            }
            heads.lock().unwrap().push(head);
        }
    });
    (format!("http://{address}"), asked)
}
